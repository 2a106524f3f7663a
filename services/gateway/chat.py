"""Chat requests: from messages to a prompt, and to how the answer is read."""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from protos.forebay.v1 import generation_pb2
from services.gateway import messages, structured, tools
from services.gateway import options as common
from services.gateway.fields import Fields, Range
from services.gateway.models import ServedModel
from services.gateway.parsers.formats import Parsing, opens_thought
from services.gateway.request import Caller, Job, Prompt, make_job
from services.gateway.tokenizer import NUM_CHARS_INLINE
from shared.errors import InvalidRequest, Unsupported

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
# The API's older names for tools, and modalities that are not text.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "prediction": (),
    "echo": (False,),
    "chat_template": (),
    "documents": ([],),
}


async def job(raw: Mapping[str, Any], caller: Caller, model: ServedModel, max_choices: int) -> Job:
    """Check a request and tokenize its prompt. Raises InvalidRequest, ContextTooLong, Unsupported."""
    fields = Fields(raw)
    common.refuse_unsupported(fields, _UNSUPPORTED)
    options = common.parse(fields, model.defaults, _num_logprobs(fields), _max_tokens(fields))
    declared = tools.read(fields)
    parsing = _parsing(fields, declared, model)
    text, token_ids = await prompt(fields, model, declared)
    parsing = replace(parsing, thinks=parsing.has_thoughts and opens_thought(text))
    _constrain(fields, options.sampling, declared, parsing, model)
    await structured.check(fields, options.sampling, model, parsing)
    return make_job(caller, model, options, [Prompt(tuple(token_ids), text)], max_choices, parsing=parsing)


async def prompt(fields: Fields, model: ServedModel, declared: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
    """What the model is to go on from, as text and tokens. Raises InvalidRequest, Unsupported."""
    conversation, tokenizer = messages.read(fields), model.tokenizer("messages")
    render = _open_ended if fields.flag("continue_final_message") else _render
    text = await render(model, conversation, declared, _arguments(fields))
    # The template writes the special tokens itself.
    return text, await tokenizer.encode(text, special=fields.flag("add_special_tokens") or False)


async def _open_ended(
    model: ServedModel,
    conversation: list[dict[str, Any]],
    declared: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
) -> str:
    """A rendered conversation up to the end of what its last message says, so that the answer goes on with it.

    A mark shows where that is: what is said may be said elsewhere too, and templates strip its end.
    """
    final, mark = conversation[-1], secrets.token_hex(16)
    if final["role"] != "assistant" or not final["content"]:
        raise InvalidRequest("'continue_final_message' needs a last message of the assistant's", param="messages")
    marked = [*conversation[:-1], final | {"content": final["content"] + mark}]
    text, found, _ = (await _render(model, marked, declared, arguments)).rpartition(mark)
    if not found:
        raise InvalidRequest("the chat template leaves the last message out: it cannot go on", param="messages")
    return text


async def _render(
    model: ServedModel,
    conversation: list[dict[str, Any]],
    declared: Sequence[Mapping[str, Any]],
    arguments: Mapping[str, Any],
) -> str:
    template = model.chat_template()
    conversation = messages.for_template(conversation, template.sources)
    if sum(len(message["content"]) for message in conversation) <= NUM_CHARS_INLINE:
        return template.render(conversation, declared or None, arguments)
    return await asyncio.to_thread(template.render, conversation, declared or None, arguments)


def _arguments(fields: Fields) -> dict[str, Any]:
    """Arguments of the template: the client's own, and those that fields of this API and of GLM's stand for."""
    arguments: dict[str, Any] = {}
    effort = fields.text("reasoning_effort")
    if effort is not None:
        if effort not in EFFORTS:
            raise InvalidRequest(f"'reasoning_effort' must be one of {', '.join(EFFORTS)}", param="reasoning_effort")
        arguments["reasoning_effort"] = effort
        if effort == "none":
            arguments["enable_thinking"] = False
    arguments |= _thinking(fields)
    begins, goes_on = fields.flag("add_generation_prompt"), fields.flag("continue_final_message")
    if begins and goes_on:
        message = "an answer either begins ('add_generation_prompt') or goes on with the last message"
        raise InvalidRequest(message, param="continue_final_message")
    if begins is False or goes_on:
        arguments["add_generation_prompt"] = False
    return arguments | (fields.object("chat_template_kwargs") or {})


def _thinking(fields: Fields) -> dict[str, Any]:
    thinking = fields.object("thinking")
    if thinking is None:
        return {}
    if thinking.get("type") not in ("enabled", "disabled"):
        raise InvalidRequest('\'thinking.type\' must be "enabled" or "disabled"', param="thinking")
    keep = Fields(thinking).flag("clear_thinking")
    return {"enable_thinking": thinking["type"] == "enabled"} | ({} if keep is None else {"clear_thinking": keep})


def _parsing(fields: Fields, declared: Sequence[Mapping[str, Any]], model: ServedModel) -> Parsing:
    formats = model.text.formats
    if not tools.are_callable(fields, declared):
        return Parsing(formats)
    if formats.tools == "none":
        raise Unsupported(
            f"how the model '{model.name}' calls tools is not known: its chat template shows no format that this "
            "server reads (--tool-parser); with 'tool_choice' \"none\" the tools are only shown to the model",
            param="tools",
        )
    single = fields.flag("parallel_tool_calls") is False
    return Parsing(formats, tools=tools.by_name(declared), single_call=single)


def _constrain(
    fields: Fields,
    sampling: generation_pb2.SamplingParams,
    declared: Sequence[Mapping[str, Any]],
    parsing: Parsing,
    model: ServedModel,
) -> None:
    """Calls that are demanded are a grammar of the answer; where tools may be called there can be no other."""
    wanted = tools.demanded(fields, declared)
    if parsing.tools is not None and (name := structured.field(fields)):
        raise Unsupported(
            f"'{name}' beside 'tools' is not supported: with 'tool_choice' \"none\" the tools are only shown to the "
            "model",
            param=name,
        )
    if wanted is not None:
        structured.demand(fields, sampling, wanted, parsing, model)


def _num_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", common.COUNT)
    if top and not wanted:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true", param="top_logprobs")
    return common.max_logprobs("top_logprobs", top or 0) if wanted else None


def _max_tokens(fields: Fields) -> int | None:
    newer = fields.integer("max_completion_tokens", Range(1, 2**31 - 1))
    older = fields.integer("max_tokens", Range(1, 2**31 - 1))
    return older if newer is None else newer
