"""The tools of a response, as those of a chat: functions, which the client runs."""

from collections.abc import Mapping
from typing import Any

from services.gateway.fields import Fields, filled, wrong_type
from shared.errors import InvalidRequest, Unsupported

# What a model is shown of a function, in this order.
_SHOWN = ("name", "description", "parameters")


def read(fields: Fields) -> list[dict[str, Any]] | None:
    """The tools. Raises InvalidRequest, Unsupported."""
    tools = fields.array("tools")
    return None if tools is None else [_tool(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def choice(asked: object) -> object:
    """What is wanted of the tools, where it is a function by its name; else as it is."""
    match asked:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
    return asked


def _tool(tool: object, param: str) -> dict[str, Any]:
    if not isinstance(tool, dict):
        wrong_type(param, "an object", tool)
    kind = tool.get("type")
    if not isinstance(kind, str):
        wrong_type(f"{param}.type", "a string", kind)
    if kind != "function":
        message = f"'{param}': tools of type {kind[:50]!r} are not supported: offer a function, and run it yourself"
        raise Unsupported(message, param=param)
    return {"type": "function", "function": _function(tool, param)}


def _function(tool: Mapping[str, Any], param: str) -> dict[str, Any]:
    filled(tool, "name", param)
    if not isinstance(tool.get("parameters"), dict | None):
        raise InvalidRequest(f"'{param}.parameters' must be a JSON schema, an object", param=f"{param}.parameters")
    return {key: tool[key] for key in _SHOWN if tool.get(key) is not None}
