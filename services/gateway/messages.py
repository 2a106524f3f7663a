"""The messages of a chat request, checked, and in the shape that chat templates expect."""

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from services.gateway.fields import Fields, name_of, wrong_type
from shared.errors import InvalidRequest, Unsupported

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


def read(fields: Fields) -> list[dict[str, Any]]:
    """The conversation. Raises InvalidRequest, Unsupported.

    Content is one string, arguments of tool calls are objects, and reasoning is in `reasoning_content`.
    """
    messages = fields.array("messages")
    if messages is None:
        raise InvalidRequest("'messages' is missing", param="messages")
    if not messages:
        raise InvalidRequest("'messages' must have at least one message", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def for_template(conversation: list[dict[str, Any]], sources: Sequence[str]) -> list[dict[str, Any]]:
    """Call developers' messages the system's, as they were once, where a template knows only those."""
    if any("developer" in source for source in sources):
        return conversation
    return [m | {"role": "system"} if m["role"] == "developer" else m for m in conversation]


def _message(message: object, param: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        wrong_type(param, "an object", message)
    role = message.get("role")
    if not isinstance(role, str):
        wrong_type(f"{param}.role", "a string", role)
    if role not in ROLES:
        raise InvalidRequest(f"'{param}.role' must be one of {', '.join(ROLES)}, not {role!r}", param=f"{param}.role")
    content = text_of(message.get("content"), f"{param}.content", required=role != "assistant")
    read = {key: value for key, value in message.items() if value is not None} | {"content": content}
    if role == "assistant":
        read |= _reasoning(message, param) | _calls(message, f"{param}.tool_calls")
    elif role == "tool":
        _string(message, "tool_call_id", param)
    return read


def text_of(content: object, param: str, *, required: bool = True) -> str:
    """The text of a message; an assistant's may be absent, beside its calls. Raises InvalidRequest, Unsupported."""
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


def _reasoning(message: Mapping[str, Any], param: str) -> dict[str, str]:
    """`reasoning` is another server's name for it."""
    found = [_string(message, name, param) for name in ("reasoning_content", "reasoning")]
    text = found[0] if found[0] is not None else found[1]
    return {} if text is None else {"reasoning_content": text}


def _calls(message: Mapping[str, Any], param: str) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if calls is None:
        return {}
    if not isinstance(calls, list):
        wrong_type(param, "an array", calls)
    return {"tool_calls": [_call(call, f"{param}[{i}]") for i, call in enumerate(calls)]} if calls else {}


def _call(call: object, param: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        wrong_type(param, "an object", call)
    function = call.get("function")
    if not isinstance(function, dict):
        wrong_type(f"{param}.function", "an object", function)
    if _string(function, "name", f"{param}.function") is None:
        raise InvalidRequest(f"'{param}.function.name' is missing", param=f"{param}.function.name")
    arguments = arguments_of(function.get("arguments"), f"{param}.function.arguments")
    return {"type": "function"} | call | {"function": function | {"arguments": arguments}}


def arguments_of(arguments: object, param: str) -> dict[str, Any]:
    """OpenAI's protocol has them as a string of JSON, templates as an object. Raises InvalidRequest."""
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments) if arguments.strip() else {}
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"'{param}' must be a JSON object in a string: {error}", param=param) from None
    if arguments is None:
        return {}
    if not isinstance(arguments, dict):
        wrong_type(param, "a JSON object in a string", arguments)
    return arguments


def _string(message: Mapping[str, Any], name: str, param: str) -> str | None:
    value = message.get(name)
    if value is not None and not isinstance(value, str):
        wrong_type(f"{param}.{name}", "a string", value)
    return value
