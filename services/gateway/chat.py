"""Chat requests: from messages to a prompt."""

from collections.abc import Mapping
from typing import Any

from services.gateway import options as common
from services.gateway.fields import Fields, Range, name_of, wrong_type
from services.gateway.models import ServedModel
from services.gateway.request import Caller, Job, Prompt, make_job
from shared.errors import InvalidRequest, Unsupported

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# The API's older names for tools, and modalities that are not text.
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "prediction": (),
    "echo": (False,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
}


async def job(raw: Mapping[str, Any], caller: Caller, model: ServedModel, max_choices: int) -> Job:
    """Check a request and tokenize its prompt. Raises InvalidRequest, ContextTooLong, Unsupported."""
    fields = Fields(raw)
    common.refuse_unsupported(fields, _UNSUPPORTED)
    options = common.parse(fields, model.defaults, _num_logprobs(fields), _max_tokens(fields))
    messages, tools = _messages(fields), _tools(fields)
    arguments = dict(fields.object("chat_template_kwargs") or {})
    if fields.flag("add_generation_prompt") is False:
        arguments["add_generation_prompt"] = False
    tokenizer = model.tokenizer("messages")
    text = model.chat_template().render(messages, tools, arguments)
    # The template writes the special tokens itself.
    token_ids = await tokenizer.encode(text, special=fields.flag("add_special_tokens") or False)
    prompts = [Prompt(tuple(token_ids), text)]
    return make_job(caller, model, options, prompts, max_choices, is_chat=True)


def _num_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs", common.COUNT)
    if top and not wanted:
        raise InvalidRequest("'top_logprobs' needs 'logprobs' to be true", param="top_logprobs")
    return common.max_logprobs("top_logprobs", top or 0) if wanted else None


def _max_tokens(fields: Fields) -> int | None:
    newer = fields.integer("max_completion_tokens", Range(1, 2**31 - 1))
    older = fields.integer("max_tokens", Range(1, 2**31 - 1))
    return older if newer is None else newer


def _tools(fields: Fields) -> list[Any] | None:
    """Tools are shown to the model; what it answers is text, so nothing that promises calls can be honoured."""
    tools = fields.array("tools")
    for tool in tools or ():
        if not isinstance(tool, dict) or not isinstance(tool.get("function"), dict):
            raise InvalidRequest("each entry of 'tools' must be an object with a 'function'", param="tools")
    match fields.raw("tool_choice"):
        case None if tools:
            raise Unsupported(
                "tool calls are not supported; with 'tool_choice' \"none\" the tools are only shown to the model",
                param="tools",
            )
        case None | "none":
            return tools or None
        case "auto" | "required" | dict():
            raise Unsupported("'tool_choice' other than \"none\" is not supported", param="tool_choice")
    raise InvalidRequest('\'tool_choice\' must be "none", "auto", "required" or an object', param="tool_choice")


def _messages(fields: Fields) -> list[dict[str, Any]]:
    messages = fields.array("messages")
    if messages is None:
        raise InvalidRequest("'messages' is missing", param="messages")
    if not messages:
        raise InvalidRequest("'messages' must have at least one message", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: object, param: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        wrong_type(param, "an object", message)
    role = message.get("role")
    if not isinstance(role, str):
        raise InvalidRequest(f"'{param}.role' must be a string, not {name_of(role)}", param=f"{param}.role")
    if role not in ROLES:
        raise InvalidRequest(f"'{param}.role' must be one of {', '.join(ROLES)}, not {role!r}", param=f"{param}.role")
    content = _content(message.get("content"), f"{param}.content", required=role != "assistant")
    return message | {"content": content}


def _content(content: object, param: str, *, required: bool) -> str:
    """The text of a message; an assistant's may be absent, beside its tool calls."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "\n".join(_part(part, f"{param}[{i}]") for i, part in enumerate(content))
    if content is None and not required:
        return ""
    raise InvalidRequest(f"'{param}' must be a string or an array of parts, not {name_of(content)}", param=param)


def _part(part: object, param: str) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise InvalidRequest(f"'{param}' must be an object with a 'type'", param=param)
    if part["type"] not in ("text", "input_text", "output_text", "refusal"):
        raise Unsupported(f"'{param}': parts of type {part['type'][:50]!r} are not supported, only text", param=param)
    text = part.get("refusal" if part["type"] == "refusal" else "text")
    if not isinstance(text, str):
        raise InvalidRequest(f"'{param}' must have its text as a string", param=param)
    return text
