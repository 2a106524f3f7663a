"""From tokens to pieces of output: text and tags, up to the first stop string."""

from collections import deque
from collections.abc import Iterator

from services.gateway.options import Options
from services.gateway.parsers.api import Piece, Tag
from services.gateway.parsers.tags import TagScanner
from services.gateway.request import Prompt
from services.gateway.stops import StopStrings
from services.gateway.tokenizer import Tokenizer


class Reader:
    """Reads one output of a prompt.

    A tag that is a token is found on its id, so that text which only looks like it stays text; other tags are found in
    the text. Stop strings see the text of tags as they see everything that is not skipped.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Prompt, options: Options, tags: tuple[str, ...]) -> None:
        self._stops = StopStrings(options.stop, options.include_stop)
        skip = options.skip_special_tokens
        self._detokenizer = tokenizer.detokenizer(prompt.token_ids, skip_special=skip) if tokenizer else None
        added = tokenizer.added_tokens if tokenizer else {}
        self._tags = {added[tag]: Tag(tag) for tag in tags if tag in added}
        self._skipped = tokenizer.special if tokenizer and skip else frozenset()
        self._scanner = TagScanner([tag for tag in tags if tag not in added])
        self._marks: deque[tuple[int, int, Tag]] = deque()  # characters from, to
        self._num_fed = self._num_passed = 0
        self._passed_partly = ""

    def feed(self, token_id: int, *, stops: bool = True) -> tuple[list[Piece], str | None]:
        """The pieces that a token completes, and the stop string that ends the output, which counts if `stops`."""
        text, tag = self._text(token_id), self._tags.get(token_id)
        if tag is not None:
            visible = "" if token_id in self._skipped else tag.text
            begin = self._num_fed + len(text)
            self._marks.append((begin, begin + len(visible), tag))
            text += visible
        self._num_fed += len(text)
        released, stop = self._stops.feed(text) if stops else (self._stops.pass_through(text), None)
        return self._pass_on(released, end=stop is not None), stop

    def flush(self) -> tuple[list[Piece], str | None]:
        """What was held back, at the end of the output."""
        text = self._detokenizer.flush() if self._detokenizer else ""
        self._num_fed += len(text)
        released, stop = self._stops.feed(text)
        if stop is None:
            released += self._stops.flush()
        return self._pass_on(released, end=True), stop

    def _text(self, token_id: int) -> str:
        """The text of a token; what is left of the text before it, if it is a tag."""
        if self._detokenizer is None:
            return ""
        return self._detokenizer.flush() if token_id in self._tags else self._detokenizer.feed(token_id)

    def _pass_on(self, released: str, *, end: bool) -> list[Piece]:
        if not self._marks and not self._scanner.tags:  # of most outputs: there is nothing but text
            self._num_passed += len(released)
            return [released] if released else []
        pieces = [piece for mark in self._cut(released) for piece in self._scanner.feed(mark)]
        return [*pieces, *self._scanner.flush()] if end else pieces

    def _cut(self, released: str) -> Iterator[Piece]:
        """Put the tags back where they were in the text; half a tag waits for its other half."""
        if not self._marks:
            if released:
                self._num_passed += len(released)
                yield released
            return
        text, self._passed_partly = self._passed_partly + released, ""
        while self._marks and self._marks[0][1] <= self._num_passed + len(text):
            begin, end, tag = self._marks.popleft()
            if before := text[: begin - self._num_passed]:
                yield before
            yield tag
            text, self._num_passed = text[end - self._num_passed :], end
        until = self._marks[0][0] - self._num_passed if self._marks else len(text)
        if whole := text[:until]:
            yield whole
        self._num_passed += len(whole)
        self._passed_partly = text[until:]
