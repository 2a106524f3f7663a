"""A grammar of the tool calls that a client demands, as the model writes them, in Lark with llguidance's additions.

A tag that is a token of its own can only be that token, which no text contains; another one is text, and a text before
it ends where it first comes.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from services.gateway.parsers.api import Tools
from services.gateway.parsers.formats import CALL_TAGS
from services.gateway.parsers.glm_calls import TAGS
from services.gateway.parsers.schema import types_of
from shared.grammar import WHITESPACE

# Ids of tokens that are added to a vocabulary, by their text.
Added = Mapping[str, int]
# As the client described it.
Tool = Mapping[str, Any]


def grammar(style: str, tools: Tools, added: Added, *, single: bool) -> str:
    """Calls of some of the tools, at least one; of `style` "glm" or "hermes"."""
    rules = [f"start: call{'' if single else '+'}", f"call: {' | '.join(f'call_{i}' for i in range(len(tools)))}"]
    for number, (name, tool) in enumerate(tools.items()):
        rules += _CALLS[style](f"call_{number}", name, tool, added)
    return "\n".join(rules)


def _hermes(rule: str, name: str, tool: Tool, added: Added) -> list[str]:
    opened, closed = (_tag(tag, added) for tag in CALL_TAGS)
    arguments = {"type": "object"} | (tool.get("parameters") or {})
    call: dict[str, Any] = {"type": "object", "properties": {"name": {"const": name}, "arguments": arguments}}
    call |= {"required": ["name", "arguments"], "additionalProperties": False}
    return [f'{rule}: {opened} "\\n" {rule}_json "\\n" {closed}', f"{rule}_json: {_json(call)}"]


def _glm(rule: str, name: str, tool: Tool, added: Added) -> list[str]:
    opened, closed = (_tag(tag, added) for tag in CALL_TAGS)
    parameters, asked, rules = tool.get("parameters") or {}, [json.dumps(name)], list[str]()
    for number, key in enumerate(parameters.get("properties") or {}):
        argument = f"{rule}_{number}"
        asked.append(argument if key in (parameters.get("required") or ()) else f"{argument}?")
        rules += _argument(argument, key, tool, added)
    return [f"{rule}: {opened} {' '.join(asked)} {closed}", *rules]


def _argument(rule: str, key: str, tool: Tool, added: Added) -> list[str]:
    schema = tool["parameters"]["properties"][key]
    key_opened, key_closed, opened, closed = (_tag(tag, added) for tag in TAGS)
    head = f"{rule}: {key_opened} {json.dumps(key)} {key_closed} {opened} {rule}_value"
    if types_of(tool, key) != {"string"}:
        return [f"{head} {closed}", f"{rule}_value: {_json(schema)}"]
    if choices := schema.get("enum"):
        return [f"{head} {closed}", f"{rule}_value: {' | '.join(map(json.dumps, choices))}"]
    if TAGS[3] in added:
        return [f"{head} {closed}", rf"{rule}_value: /(.|\n)*/"]
    return [head, rf"{rule}_value[suffix={closed}]: /(.|\n)*/"]


def _tag(text: str, added: Added) -> str:
    return f"<[{added[text]}]>" if text in added else json.dumps(text)


def _json(schema: Any) -> str:
    spaced = {"x-guidance": {"whitespace_pattern": WHITESPACE}} | schema if isinstance(schema, dict) else schema
    return f"%json {json.dumps(spaced)}"


_CALLS: Mapping[str, Callable[[str, str, Tool, Added], list[str]]] = {"glm": _glm, "hermes": _hermes}
