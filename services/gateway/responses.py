"""Requests of OpenAI's Responses API: each is a chat by other names (docs/decisions/0070).

Additions of vLLM's are passed on as they are; what asks for something that is kept from one request to the next, or for
tools that a server runs by itself, is refused.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from services.gateway import chat, response_input, response_tools, tools
from services.gateway import options as common
from services.gateway.fields import Fields, Range
from services.gateway.models import ServedModel
from services.gateway.request import Caller, Job
from shared.errors import Fault, InvalidRequest, Unsupported

LOGPROBS = "message.output_text.logprobs"
# Things that an answer may have besides; of those but the first there are none, and reasoning is not encrypted.
_INCLUDABLE = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
# Fields of this API that a chat has not, or has in another form.
_OWN = (
    *("input", "instructions", "max_output_tokens", "text", "reasoning", "tools", "tool_choice", "include"),
    *("top_logprobs", "stream_options"),
)
# Fields of a chat that have another name here.
_MOVED = {
    "messages": "'input'",
    "max_tokens": "'max_output_tokens'",
    "max_completion_tokens": "'max_output_tokens'",
    "response_format": "'text.format'",
    "reasoning_effort": "'reasoning.effort'",
    "logprobs": f"'include' with {LOGPROBS!r}",
}
_KEPT = "nothing is kept from one request to the next: send the earlier items, too, as 'input'"
# What would change what the client gets: values that ask for nothing, and what to do instead.
_UNSUPPORTED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "previous_response_id": ((), _KEPT),
    "conversation": ((), _KEPT),
    "background": ((False,), "nothing is kept here to be asked for later: wait for the answer, or have it streamed"),
    "prompt": ((), "no prompts are kept here: send its text as 'instructions' and 'input'"),
    "context_management": (([],), "send as 'input' what the model is to see"),
    "truncation": (("disabled",), "leave earlier items out of 'input'"),
    "moderation": ((), "ask a model for it"),
    "n": ((1,), "a response is one output: ask again, or ask /v1/chat/completions"),
    "return_token_ids": ((False,), "/v1/chat/completions tells them"),
    "return_tokens_as_token_ids": ((False,), "/v1/chat/completions tells them"),
    "prompt_logprobs": ((), "/v1/chat/completions tells them"),
}
# A chat's names in faults, and what they are here.
_NAMES = (
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("reasoning_effort", "reasoning.effort"),
)
MAX_METADATA = (16, 64, 512)  # pairs, characters of a key, of a value
_COUNT = Range(1, 2**31 - 1)


async def job(raw: Mapping[str, Any], caller: Caller, model: ServedModel, max_choices: int) -> Job:
    """The same as of a chat. Raises InvalidRequest, ContextTooLong, Unsupported."""
    asked = _as_chat(raw)
    with _own_names():
        return replace(await chat.job(asked, caller, model, max_choices), in_parts=True)


async def count(raw: Mapping[str, Any], model: ServedModel) -> int:
    """The tokens of the prompt that a request would make. Raises InvalidRequest, Unsupported."""
    asked = Fields(_as_chat(raw))
    with _own_names():
        return len((await chat.prompt(asked, model, tools.read(asked)))[1])


def settled(raw: Mapping[str, Any], model: ServedModel) -> dict[str, Any]:
    """What an answer repeats of its request, with the defaults of what that does not say."""
    fields = Fields(raw)
    text = {name: value for name, value in (raw.get("text") or {}).items() if value is not None}

    def given(name: str, otherwise: Any) -> Any:
        return otherwise if raw.get(name) is None else raw[name]

    return {
        "background": False,
        "instructions": raw.get("instructions"),
        "max_output_tokens": raw.get("max_output_tokens"),
        "max_tool_calls": raw.get("max_tool_calls"),
        "metadata": _metadata(fields),
        "model": model.name,
        "parallel_tool_calls": given("parallel_tool_calls", True),
        "previous_response_id": None,
        "prompt_cache_key": raw.get("prompt_cache_key"),
        "reasoning": {"effort": (raw.get("reasoning") or {}).get("effort"), "summary": None},
        "safety_identifier": raw.get("safety_identifier"),
        "service_tier": "default",
        "store": False,
        "temperature": given("temperature", model.defaults.get("temperature", 1.0)),
        "text": {"format": {"type": "text"}} | text,
        "tool_choice": given("tool_choice", "auto"),
        "tools": given("tools", []),
        "top_logprobs": given("top_logprobs", 0),
        "top_p": given("top_p", model.defaults.get("top_p", 1.0)),
        "truncation": "disabled",
        "user": raw.get("user"),
    }


@contextmanager
def _own_names() -> Iterator[None]:
    """Let a chat's faults name things as they are called here."""
    try:
        yield
    except Fault as fault:
        raise _in_own_names(fault) from None


def _in_own_names(fault: Fault) -> Fault:
    message, param = fault.message, fault.param
    for name, own in _NAMES:
        message = message.replace(f"'{name}", f"'{own}")
        if param is not None and param.startswith(name):
            param = own + param.removeprefix(name)
    return type(fault)(message, param=param, metadata=fault.metadata)


def _refuse(fields: Fields) -> None:
    for name in fields.present(_MOVED):
        if fields.raw(name) is not None:
            raise InvalidRequest(f"'{name}' is of chat completions: say {_MOVED[name]}", param=name)
    for name in fields.present(_UNSUPPORTED):
        nothing, instead = _UNSUPPORTED[name]
        value = fields.raw(name)
        if value is not None and not any(value == other for other in nothing):
            raise Unsupported(f"'{name}' is not supported: {instead}", param=name)


def _as_chat(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a chat that asks for the same. Raises InvalidRequest, Unsupported."""
    fields = Fields(raw)
    _refuse(fields)
    _check_what_is_repeated(fields)
    own = {
        "messages": response_input.read(fields),
        "max_completion_tokens": fields.integer("max_output_tokens", _COUNT),
        "response_format": _format(fields),
        "reasoning_effort": (fields.object("reasoning") or {}).get("effort"),
        "tools": response_tools.read(fields),
        "tool_choice": response_tools.choice(fields.raw("tool_choice")),
    }
    return {name: value for name, value in raw.items() if name not in _OWN} | own | _logprobs(fields)


def _format(fields: Fields) -> dict[str, Any] | None:
    """`response_format` of a chat, which has a schema and its name in an object of their own."""
    asked = Fields(fields.object("text") or {}).raw("format")
    if not isinstance(asked, dict | None):
        raise InvalidRequest("'text.format' must be an object", param="text.format")
    if asked is None or asked.get("type") != "json_schema":
        return asked
    return {"type": "json_schema", "json_schema": asked}


def _logprobs(fields: Fields) -> dict[str, Any]:
    included, top = fields.array("include") or [], fields.integer("top_logprobs", common.COUNT)
    for name in included:
        if name not in _INCLUDABLE:
            raise InvalidRequest(f"'include' may have {', '.join(_INCLUDABLE)}", param="include")
    if LOGPROBS in included:
        return {"logprobs": True, "top_logprobs": top or 0}
    if top:
        raise InvalidRequest(f"'top_logprobs' needs {LOGPROBS!r} among what is to 'include'", param="top_logprobs")
    return {}


def _check_what_is_repeated(fields: Fields) -> None:
    """Of what no chat looks at."""
    _metadata(fields)
    for name in ("user", "safety_identifier", "prompt_cache_key"):
        fields.text(name)
    fields.flag("store")
    fields.flag("parallel_tool_calls")
    fields.integer("max_tool_calls", common.COUNT)


def _metadata(fields: Fields) -> dict[str, str]:
    metadata = fields.object("metadata") or {}
    num_pairs, num_key, num_value = MAX_METADATA
    if len(metadata) > num_pairs:
        raise InvalidRequest(f"'metadata' must have at most {num_pairs} pairs", param="metadata")
    for key, value in metadata.items():
        if len(key) > num_key or not isinstance(value, str) or len(value) > num_value:
            message = f"keys of 'metadata' have at most {num_key} characters, values are strings of at most {num_value}"
            raise InvalidRequest(message, param="metadata")
    return metadata
