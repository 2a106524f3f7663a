"""The tools of a chat request, and what the client wants of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from services.gateway.fields import Fields
from services.gateway.parsers.api import Tools
from shared.errors import InvalidRequest, Unsupported

_FORCED = (
    '\'tool_choice\' can be "auto" or "none" here: to force a call, the output would have to be constrained to it, '
    "which this server cannot do yet"
)


def read(fields: Fields) -> list[dict[str, Any]]:
    """The tools as the client described them. Raises InvalidRequest."""
    tools = fields.array("tools") or []
    for i, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise InvalidRequest("each entry of 'tools' must be an object with a 'function'", param="tools")
        if not isinstance(name := function.get("name"), str) or not name:
            raise InvalidRequest(f"'tools[{i}].function.name' must be a string that is not empty", param="tools")
        if not isinstance(function.get("parameters", {}), dict | None):
            raise InvalidRequest(f"'tools[{i}].function.parameters' must be a JSON schema, an object", param="tools")
    return tools


def are_callable(fields: Fields, tools: Sequence[Mapping[str, Any]]) -> bool:
    """Whether calls are told apart from text. Raises Unsupported for calls that are demanded."""
    match fields.raw("tool_choice"):
        case None | "auto":
            return bool(tools)
        case "none":
            return False
        case "required" | dict():
            raise Unsupported(_FORCED, param="tool_choice")
    raise InvalidRequest('\'tool_choice\' must be "none", "auto", "required" or an object', param="tool_choice")


def by_name(tools: Sequence[Mapping[str, Any]]) -> Tools:
    """Tools as parsers look them up."""
    return {tool["function"]["name"]: tool["function"] for tool in tools}
