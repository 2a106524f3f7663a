"""Hermes' tool calls, which Qwen uses too: {"name": NAME, "arguments": {...}} between the tags.

Where the name comes first the arguments stream as the model writes them; otherwise the call comes when it is whole.
"""

import re

import orjson

from services.gateway.parsers.api import CallParser, Piece, Tag, Tools

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)+")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')
MAX_HEAD_CHARS = 4_096


class JsonCall(CallParser):
    """One call."""

    def __init__(self, _tools: Tools) -> None:
        self._head = ""  # all of the call, until its arguments stream
        self._body: list[str] = []
        self._arguments = _JsonValue()

    def ends_at(self, tag: Tag) -> bool:
        """See CallParser."""
        return tag.text == "</tool_call>" and not self._arguments.in_string

    def feed(self, piece: Piece) -> str:
        """See CallParser."""
        text = piece.text if isinstance(piece, Tag) else piece
        self._body.append(text)
        if self.name is not None:
            return self._arguments.feed(text)
        self._head += text
        if len(self._head) > MAX_HEAD_CHARS:
            return ""  # nothing like a name yet: look once more at the end
        if (match := _HEAD.match(self._head)) and isinstance(name := _parse(match[1]), str):
            self.name = name
            return self._arguments.feed(self._head[match.end() :])
        return ""

    def close(self) -> str:
        """See CallParser."""
        call = _parse("".join(self._body))
        if not isinstance(call, dict):
            return ""
        name, arguments = call.get("name"), call.get("arguments", call.get("parameters", {}))
        if isinstance(arguments, str):  # JSON in JSON, as OpenAI's protocol has it
            arguments = _parse(arguments)
        self.complete = isinstance(arguments, dict)
        if self.name is not None or not self.complete or not isinstance(name, str) or not name:
            return ""
        self.name = name
        return orjson.dumps(arguments).decode()

    def cut(self) -> str:
        """See CallParser: JSON that is whole lost nothing."""
        return self.close()


class _JsonValue:
    """Follows one JSON object through a text that grows, to know where it ends."""

    def __init__(self) -> None:
        self.in_string = False
        self._escaped, self._depth, self._ended = False, 0, False

    def feed(self, text: str) -> str:
        """The part of the text that belongs to the object."""
        for i, character in enumerate(text):
            if self._ended:
                return text[:i]
            self._step(character)
        return text

    def _step(self, character: str) -> None:
        if self.in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self.in_string = False
        elif character == '"':
            self.in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self._ended = self._depth == 0


def _parse(text: str) -> object:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
