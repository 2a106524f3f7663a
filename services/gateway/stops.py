"""Stop strings: text is held back while it may be the beginning of one."""

from collections.abc import Sequence


class StopStrings:
    """Looks for the first of some strings in a text that grows.

    Never releases a part of a stop string that turns out to be one; releases everything else as early as possible.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops, self._include = tuple(stops), include
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Add text. Returns what may be sent now, and the stop string if one was found: nothing follows then."""
        if not self._stops:
            return text, None
        self._held += text
        if match := self._first_match():
            position, stop = match
            return self._release(position + (len(stop) if self._include else 0)), stop
        return self._release(len(self._held) - num_held(self._held, self._stops)), None

    def flush(self) -> str:
        """The text that was held back: no stop string came of it."""
        return self._release(len(self._held))

    def pass_through(self, text: str) -> str:
        """Add text in which no stop string counts yet (min_tokens)."""
        return self.flush() + text

    def _first_match(self) -> tuple[int, str] | None:
        # The one that is complete first counts, as if characters came one by one.
        found = [(self._held.find(stop), stop) for stop in self._stops]
        return min(
            ((position, stop) for position, stop in found if position >= 0),
            key=lambda match: (match[0] + len(match[1]), match[0]),
            default=None,
        )

    def _release(self, end: int) -> str:
        released, self._held = self._held[:end], self._held[end:]
        return released


def num_held(text: str, needles: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of a needle."""
    longest = 0
    for needle in needles:
        for size in range(min(len(needle) - 1, len(text)), longest, -1):
            if text.endswith(needle[:size]):
                longest = size
                break
    return longest
