"""Finding tags in plain text, for models whose tags are no tokens of their own."""

from collections.abc import Iterator, Sequence

from services.gateway.parsers.api import Piece, Tag
from services.gateway.stops import num_held


class TagScanner:
    """Splits a text that grows at tags. What may be the beginning of a tag is held back."""

    def __init__(self, tags: Sequence[str]) -> None:
        self.tags = tuple(tags)
        self._held = ""

    def feed(self, piece: Piece) -> Iterator[Piece]:
        """Add text, or a tag that was found on its token id."""
        if isinstance(piece, Tag):
            yield from self.flush()
            yield piece
        elif not self.tags:
            yield piece
        else:
            yield from self._scan(self._held + piece)

    def flush(self) -> Iterator[Piece]:
        """What was held back: no tag came of it."""
        text, self._held = self._held, ""
        if text:
            yield text

    def _scan(self, text: str) -> Iterator[Piece]:
        while match := self._first(text):
            position, tag = match
            if position:
                yield text[:position]
            yield Tag(tag, certain=False)
            text = text[position + len(tag) :]
        end = len(text) - num_held(text, self.tags)
        self._held = text[end:]
        if end:
            yield text[:end]

    def _first(self, text: str) -> tuple[int, str] | None:
        found = ((text.find(tag), tag) for tag in self.tags)
        return min((match for match in found if match[0] >= 0), default=None)
