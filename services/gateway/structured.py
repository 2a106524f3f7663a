"""Structured output: what a client's request holds the answer to, as OpenAI names it and as vLLM does."""

import asyncio
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

from protos.forebay.v1 import generation_pb2
from services.gateway.fields import Fields, wrong_type
from services.gateway.models import ServedModel
from services.gateway.parsers import demanded
from services.gateway.parsers.api import Tools
from services.gateway.parsers.formats import THINK_TAGS, Parsing
from shared import grammar
from shared.errors import InvalidRequest, Unsupported
from shared.grammar import Grammar, Kind

# Valid ones that are remembered: clients ask for the same again and again.
_require_valid = lru_cache(maxsize=256)(grammar.require_valid)


def read(fields: Fields) -> generation_pb2.Grammar | None:
    """The grammar of the answer, if it is held to one. Raises InvalidRequest, Unsupported."""
    found = _asked(fields)
    if not found:
        return None
    name, message = found[0]
    if len(found) > 1:
        raise InvalidRequest(f"'{name}' and '{found[1][0]}' cannot both say what the answer is", param=found[1][0])
    _require_end(fields, name)
    return message


def field(fields: Fields) -> str | None:
    """The field that says what the answer is held to."""
    return next((name for name, _ in _asked(fields)), None)


def demand(
    fields: Fields, sampling: generation_pb2.SamplingParams, tools: Tools, parsing: Parsing, model: ServedModel
) -> None:
    """Hold the answer to calls of these tools. Raises InvalidRequest, Unsupported."""
    _require_end(fields, "tool_choice")
    added = model.tokenizer("tools").added_tokens
    calls = demanded.grammar(parsing.formats.tools, tools, added, single=parsing.single_call)
    sampling.grammar.CopyFrom(generation_pb2.Grammar(lark=calls))


async def check(
    fields: Fields, sampling: generation_pb2.SamplingParams, model: ServedModel, parsing: Parsing | None = None
) -> None:
    """Raises InvalidRequest or Unsupported for a grammar that no worker could use; has one begin behind the reasoning
    if that is where the model is."""
    if not sampling.HasField("grammar"):
        return
    param = field(fields) or "tools"
    asked, tokenizer = sampling.grammar, model.tokenizer(param)
    if parsing is not None and parsing.thinks:
        end = tokenizer.added_tokens.get(THINK_TAGS[1])
        if end is None:
            raise Unsupported(f"where the reasoning of '{model.name}' ends is no token of its own", param=param)
        asked.behind_token_id = end
    kind = asked.WhichOneof("kind")
    assert kind is not None
    try:
        await asyncio.to_thread(_require_valid, Grammar(Kind(kind), getattr(asked, kind)))
    except InvalidRequest as fault:
        raise InvalidRequest(fault.message, param=param) from None


def _asked(fields: Fields) -> list[tuple[str, generation_pb2.Grammar]]:
    """The fields that hold the answer to something; several that are there may hold it to nothing."""
    given = {name: value for name in _READERS if (value := fields.raw(name)) is not None}
    return [(name, text) for name, value in given.items() if (text := _READERS[name](name, value)) is not None]


def _require_end(fields: Fields, name: str) -> None:
    for other in ("min_tokens", "ignore_eos"):
        if fields.raw(other):
            raise InvalidRequest(
                f"'{other}' cannot be had with '{name}', which says where the answer ends", param=other
            )


def described(message: generation_pb2.Grammar) -> dict[str, str]:
    """As `structured_outputs` would have it."""
    names = {"json_schema": "json", "regex": "regex", "lark": "grammar"}
    kind = message.WhichOneof("kind")
    return {} if kind is None else {names[kind]: getattr(message, kind)}


def _response_format(name: str, value: object) -> generation_pb2.Grammar | None:
    asked = _object(name, value)
    match asked.get("type"):
        case "text":
            return None
        case "json_object":
            return _json(name, {"type": "object"})
        case "json_schema":
            wanted = _object(f"{name}.json_schema", asked.get("json_schema"))
            return _json(f"{name}.json_schema.schema", wanted.get("schema"))
    raise InvalidRequest('\'response_format.type\' must be "text", "json_object" or "json_schema"', param=name)


def _structured(name: str, value: object) -> generation_pb2.Grammar | None:
    """vLLM's `structured_outputs`: one of several fields."""
    given = {key: each for key, each in _object(name, value).items() if each is not None and key in _KINDS}
    if len(given) != 1:
        raise InvalidRequest(f"'{name}' must have one of {', '.join(_KINDS)}", param=name)
    ((key, wanted),) = given.items()
    return _KINDS[key](f"{name}.{key}", wanted)


def _json(name: str, value: object) -> generation_pb2.Grammar:
    if not isinstance(value, dict | str):
        wrong_type(name, "a JSON schema", value)
    return generation_pb2.Grammar(json_schema=value if isinstance(value, str) else json.dumps(value))


def _regex(name: str, value: object) -> generation_pb2.Grammar:
    return generation_pb2.Grammar(regex=_text(name, value))


def _lark(name: str, value: object) -> generation_pb2.Grammar:
    return generation_pb2.Grammar(lark=_text(name, value))


def _choice(name: str, value: object) -> generation_pb2.Grammar:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
        raise InvalidRequest(f"'{name}' must be an array of strings that are not empty", param=name)
    return generation_pb2.Grammar(lark=f"start: {' | '.join(map(json.dumps, value))}")


def _json_object(name: str, value: object) -> generation_pb2.Grammar | None:
    if not isinstance(value, bool):
        wrong_type(name, "a boolean", value)
    return _json(name, {"type": "object"}) if value else None


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise InvalidRequest(f"'{name}' must be a string that is not empty", param=name)
    return value


def _object(name: str, value: object) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        wrong_type(name, "an object", value)
    return value


Reader = Callable[[str, object], generation_pb2.Grammar | None]
_KINDS: Mapping[str, Reader] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _lark,
    "json_object": _json_object,
}
# The guided ones are vLLM's older names.
_READERS: Mapping[str, Reader] = {
    "response_format": _response_format,
    "structured_outputs": _structured,
    "guided_json": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _lark,
}
