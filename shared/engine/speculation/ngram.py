"""Drafts without a model: what followed when the text last went as it goes now (prompt lookup, Saxena 2023)."""

from array import array
from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
TOKEN_BYTES = array("i").itemsize


class NgramProposer:
    """Satisfies `proposer.Proposer`. Keeps the tokens as bytes, in which searching is fast."""

    def __init__(self) -> None:
        self._text = bytearray()

    def propose(self, tokens: Sequence[int], num_drafts: int) -> list[int]:
        """What followed the latest earlier place where the last 2 to 4 tokens stand; the longer match wins."""
        known = len(self._text) // TOKEN_BYTES
        self._text += array("i", tokens[known:]).tobytes()
        follows = self._place()
        return [] if follows is None else continued(tokens, follows, num_drafts)

    def _place(self) -> int | None:
        """The index of the token behind the match."""
        found = None
        for size in range(SHORTEST, LONGEST + 1):
            if (at := self._find(size)) is None:
                break  # nor does anything longer stand there
            found = at + size
        return found

    def _find(self, size: int) -> int | None:
        num_bytes, end = size * TOKEN_BYTES, len(self._text) - TOKEN_BYTES
        if end < num_bytes:
            return None
        wanted = self._text[-num_bytes:]
        while (at := self._text.rfind(wanted, 0, end)) >= 0:
            if at % TOKEN_BYTES == 0:
                return at // TOKEN_BYTES
            end = at + num_bytes - 1  # it lies across tokens: on to an earlier one
        return None


def continued(tokens: Sequence[int], follows: int, num_drafts: int) -> list[int]:
    """`tokens` from `follows` on, and behind their end the drafts themselves: a period goes on and on."""
    drafts: list[int] = []
    for at in range(follows, follows + num_drafts):
        drafts.append(tokens[at] if at < len(tokens) else drafts[at - len(tokens)])
    return drafts
