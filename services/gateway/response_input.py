"""The input of a response, a string or items, as the messages of a chat.

What the model said in one turn is several items (reasoning, message, function calls) and one message.
"""

from collections.abc import Callable, Mapping
from typing import Any

from services.gateway.fields import Fields, filled, wrong_type
from services.gateway.messages import arguments_of, text_of
from shared.errors import InvalidRequest, Unsupported

ROLES = ("system", "developer", "user", "assistant")
# What an assistant's message says, in this order.
_REASONING, _CONTENT, _CALLS = "reasoning_content", "content", "tool_calls"
_ORDER = (_REASONING, _CONTENT, _CALLS)
Item = Mapping[str, Any]
Message = dict[str, Any]


def read(fields: Fields) -> list[Message]:
    """The conversation, instructions first. Raises InvalidRequest, Unsupported."""
    instructions, given = fields.text("instructions"), fields.raw("input")
    conversation = _Conversation()
    if instructions is not None:
        conversation.messages.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if given is None:
        raise InvalidRequest("'input' is missing", param="input")
    if not isinstance(given, list):
        wrong_type("input", "a string or an array of items", given)
    if not given:
        raise InvalidRequest("'input' must have at least one item", param="input")
    for i, item in enumerate(given):
        conversation.add(item, f"input[{i}]")
    return conversation.messages


class _Conversation:
    """Takes item by item."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self._call_ids: set[str] = set()
        self._kinds: Mapping[str, Callable[[Item, str], None]] = {
            "message": self._message,
            "reasoning": self._reasoning,
            "function_call": self._call,
            "function_call_output": self._output,
        }

    def add(self, item: object, param: str) -> None:
        """Take the next item. Raises InvalidRequest, Unsupported."""
        if not isinstance(item, dict):
            wrong_type(param, "an object", item)
        kind = item.get("type", "message" if "role" in item else None)
        if not isinstance(kind, str):
            raise InvalidRequest(f"'{param}' must have a 'type' or a 'role'", param=param)
        if kind == "item_reference":
            raise Unsupported(f"'{param}': no items are kept here to refer to: send the item itself", param=param)
        if kind not in self._kinds:
            message = f"'{param}': items of type {kind[:50]!r} are not supported, only {', '.join(self._kinds)}"
            raise Unsupported(message, param=param)
        self._kinds[kind](item, param)

    def _message(self, item: Item, param: str) -> None:
        role = item.get("role")
        if not isinstance(role, str):
            wrong_type(f"{param}.role", "a string", role)
        if role not in ROLES:
            message = f"'{param}.role' must be one of {', '.join(ROLES)}, not {role[:50]!r}"
            raise InvalidRequest(message, param=f"{param}.role")
        content = text_of(item.get("content"), f"{param}.content")
        if role == "assistant":
            self._said(_CONTENT)[_CONTENT] = content
        else:
            self.messages.append({"role": role, "content": content})

    def _reasoning(self, item: Item, param: str) -> None:
        """As it was, or what is left of it: servers that hide reasoning give a summary."""
        thoughts = [_thoughts(item, name, f"{param}.{name}") for name in ("content", "summary")]
        found = thoughts[0] or thoughts[1]
        if not found and item.get("encrypted_content"):
            message = f"'{param}.encrypted_content' cannot be read here: send the reasoning's 'content'"
            raise Unsupported(message, param=f"{param}.encrypted_content")
        if found:
            self._said(_REASONING)[_REASONING] = found

    def _call(self, item: Item, param: str) -> None:
        call_id, name = filled(item, "call_id", param), filled(item, "name", param)
        function = {"name": name, "arguments": arguments_of(item.get("arguments"), f"{param}.arguments")}
        calls = self._said(_CALLS).setdefault(_CALLS, [])
        calls.append({"id": call_id, "type": "function", "function": function})
        self._call_ids.add(call_id)

    def _output(self, item: Item, param: str) -> None:
        call_id, output = filled(item, "call_id", param), text_of(item.get("output"), f"{param}.output")
        if call_id not in self._call_ids:
            message = f"'{param}.call_id' is of no function_call before it: send the earlier items, too, as 'input'"
            raise InvalidRequest(message, param=f"{param}.call_id")
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": output})

    def _said(self, kind: str) -> Message:
        """The assistant's message that this comes into: the last one, if it has nothing yet that comes behind it."""
        last = self.messages[-1] if self.messages else {"role": None}
        behind = _ORDER[_ORDER.index(kind) + (kind == _CALLS) :]
        if last["role"] != "assistant" or any(other in last for other in behind):
            last = {"role": "assistant"}
            self.messages.append(last)
        return last


def _thoughts(item: Item, name: str, param: str) -> str:
    """The texts of a reasoning item, one behind the other."""
    parts = item.get(name)
    if parts is None:
        return ""
    if not isinstance(parts, list):
        wrong_type(param, "an array", parts)
    return "\n".join(_thought(part, f"{param}[{i}]") for i, part in enumerate(parts))


def _thought(part: object, param: str) -> str:
    if not isinstance(part, dict) or not isinstance(text := part.get("text"), str):
        raise InvalidRequest(f"'{param}' must be an object with a 'text'", param=param)
    return text
