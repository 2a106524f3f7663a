"""GLM's tool calls: NAME, then <arg_key>K</arg_key><arg_value>V</arg_value> for each argument.

Values are bare text; the tool's schema tells which of them are JSON. Strings stream as they come, other values when
they are whole. A value ends at its own closing tag and nowhere else, since a value may well speak of tags.
"""

from enum import Enum, auto

from services.gateway.parsers.api import CallParser, Piece, Tag, Tools
from services.gateway.parsers.schema import quote, to_json, types_of

TAGS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
MAX_NAME_CHARS = 256


class _At(Enum):
    NAME = auto()
    BETWEEN = auto()  # after the name's end or a value
    KEY = auto()
    AFTER_KEY = auto()
    VALUE = auto()
    NOWHERE = auto()  # this does not follow the grammar: no guess may be executed


class GlmCall(CallParser):
    """One call."""

    def __init__(self, tools: Tools) -> None:
        self._tools = tools
        self._at = _At.NAME
        self._text: list[str] = []
        self._num_arguments = 0
        self._types: frozenset[str] = frozenset()

    def ends_at(self, tag: Tag) -> bool:
        """See CallParser."""
        return tag.text == "</tool_call>" and self._at is not _At.VALUE

    def feed(self, piece: Piece) -> str:
        """See CallParser."""
        if isinstance(piece, Tag):
            return self._tag(piece.text)
        if self._at is _At.VALUE and self._streams:
            return quote(piece)[1:-1]
        if self._at in (_At.NAME, _At.KEY, _At.VALUE):
            self._text.append(piece)
        elif piece.strip():
            self._at = _At.NOWHERE
        return ""

    def close(self) -> str:
        """See CallParser."""
        if self._at is _At.NAME:
            self._take_name()
        self.complete = self._at is _At.BETWEEN
        return ("}" if self._num_arguments else "{}") if self.complete else ""

    def cut(self) -> str:
        """See CallParser: a name without an end, a key or a value may lack its second half."""
        return self.close() if self._at is _At.BETWEEN and self._num_arguments else ""

    @property
    def _streams(self) -> bool:
        return self._types == {"string"}

    def _tag(self, tag: str) -> str:
        match self._at, tag:
            case _At.NAME, "<arg_key>":
                self._take_name()
                self._at = _At.KEY if self.name else _At.NOWHERE
            case _At.BETWEEN, "<arg_key>":
                self._at = _At.KEY
            case _At.KEY, "</arg_key>":
                self._at = _At.AFTER_KEY
            case _At.AFTER_KEY, "<arg_value>":
                return self._begin_value()
            case _At.VALUE, "</arg_value>":
                return self._end_value()
            case _At.VALUE, _:
                return self.feed(tag)
            case _:
                self._at = _At.NOWHERE
        return ""

    def _take_name(self) -> None:
        name = self._take().strip()
        is_name = 0 < len(name) <= MAX_NAME_CHARS and not any(c.isspace() or c in '<>{}"' for c in name)
        self.name = name if is_name else None
        self._at = _At.BETWEEN if is_name else _At.NOWHERE

    def _begin_value(self) -> str:
        key = self._take().strip()
        self._types = types_of(self._tools.get(self.name or "", {}), key)
        self._at = _At.VALUE
        self._num_arguments += 1
        begin = "{" if self._num_arguments == 1 else ", "
        return f"{begin}{quote(key)}: " + ('"' if self._streams else "")

    def _end_value(self) -> str:
        self._at = _At.BETWEEN
        return '"' if self._streams else to_json(self._take(), self._types)

    def _take(self) -> str:
        text = "".join(self._text)
        self._text.clear()
        return text
