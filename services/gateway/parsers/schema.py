"""What a tool's JSON schema says of an argument that the model wrote as bare text."""

from collections.abc import Iterator, Mapping
from typing import Any

import orjson

_JSON_TYPES: Mapping[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
    type(None): "null",
}
_ANY = frozenset(_JSON_TYPES.values())
_MAX_DEPTH = 8


def types_of(tool: Mapping[str, Any], argument: str) -> frozenset[str]:
    """JSON types that an argument may have; "string" alone if the schema does not mention it."""
    parameters = tool.get("parameters")
    properties = parameters.get("properties") if isinstance(parameters, dict) else None
    schema = properties.get(argument) if isinstance(properties, dict) else None
    return frozenset({"string"}) if schema is None else frozenset(_types(schema, _MAX_DEPTH))


def to_json(text: str, types: frozenset[str]) -> str:
    """An argument as JSON: what the model wrote if that is JSON of an allowed type, else a string."""
    try:
        kind = _JSON_TYPES[type(orjson.loads(text))]
    except orjson.JSONDecodeError:
        return quote(text)
    if "string" not in types:
        return text.strip()
    # A string is written without quotes: those that it has are its own.
    fits = kind in types or (kind == "integer" and "number" in types)
    return text.strip() if fits and kind != "string" else quote(text)


def quote(text: str) -> str:
    """A JSON string."""
    return orjson.dumps(text).decode()


def _types(schema: object, depth: int) -> Iterator[str]:
    """Types by keyword; a schema that does not restrict the type allows any."""
    if not isinstance(schema, dict) or depth == 0:
        yield from _ANY
        return
    declared = schema.get("type")
    if isinstance(declared, str):
        yield declared
    elif isinstance(declared, list):
        yield from (kind for kind in declared if isinstance(kind, str))
    elif isinstance(values := schema.get("enum", [schema["const"]] if "const" in schema else None), list):
        yield from (_JSON_TYPES.get(type(value), "string") for value in values)
    elif alternatives := [a for key in ("anyOf", "oneOf") if isinstance(schema.get(key), list) for a in schema[key]]:
        for alternative in alternatives:
            yield from _types(alternative, depth - 1)
    else:
        yield from _ANY
