"""The tools of a chat request, and what the client wants of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from services.gateway.fields import Fields
from services.gateway.parsers.api import Tools
from shared.errors import InvalidRequest, Unsupported


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
    """Whether calls are told apart from text."""
    return bool(tools) and fields.raw("tool_choice") != "none"


def demanded(fields: Fields, tools: Sequence[Mapping[str, Any]]) -> Tools | None:
    """The tools of which one must be called; None if none must. Raises InvalidRequest, Unsupported."""
    match fields.raw("tool_choice"):
        case None | "auto" | "none":
            return None
        case "required":
            found = by_name(tools)
        case {"type": "function", "function": {"name": str(name)}}:
            found = {known: tool for known, tool in by_name(tools).items() if known == name}
        case {"type": str(kind)} if kind != "function":
            raise Unsupported(f"'tool_choice' of the type {kind!r} is not supported", param="tool_choice")
        case _:
            message = '\'tool_choice\' must be "none", "auto", "required" or an object that names a function'
            raise InvalidRequest(message, param="tool_choice")
    if not found:
        raise InvalidRequest("'tool_choice' demands a tool that is not among 'tools'", param="tool_choice")
    return found


def by_name(tools: Sequence[Mapping[str, Any]]) -> Tools:
    """Tools as parsers look them up."""
    return {tool["function"]["name"]: tool["function"] for tool in tools}
