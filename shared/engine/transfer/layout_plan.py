"""What each rank of a reader takes from which rank of a peer whose ranks are as many or not: pure functions of layouts.

A class that every rank has whole (latents, index keys) can be taken from any rank of the peer: readers are spread over
them. Of one that ranks share out by heads, a page of the peer holds more heads than are wanted, or fewer: then the plan
names the spans of a page to read from each rank that has some. The heads of a page lie one behind the other, each with
all its layers, so those that a rank wants of another are one span: one descriptor, straight into place. Where pages are
to be seen whole, because their checksums are, they are *staged*: read into a buffer where our pages are, and the spans
are copied out of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shared.engine.kv.layout import KvLayout, Span, StateClass
from shared.errors import Incompatible


@dataclass(frozen=True, slots=True)
class Slices:
    """The spans to take of each page of one rank of the peer."""

    spans: tuple[Span, ...]
    staged: bool

    @property
    def num_bytes(self) -> int:
        """Bytes wanted of a page."""
        return sum(span.num_bytes for span in self.spans)


@dataclass(frozen=True, slots=True)
class Take:
    """One of the peer's ranks, and what to take of its pages; None is all of them, as they are."""

    rank: int
    slices: Slices | None = None


@dataclass(frozen=True, slots=True)
class Reader:
    """One rank of a reader. Readers of different `salt` begin at different ranks of a peer that has more ranks.
    `must_stage`: pages are to be seen whole, because their checksums are."""

    rank: int = 0
    num_ranks: int = 1
    salt: int = 0
    must_stage: bool = False

    def among(self, candidates: Sequence[int]) -> int:
        """Which of several ranks that have the same to read from: equal numbers of ranks read one to one."""
        return candidates[(self.rank + self.salt * self.num_ranks) % len(candidates)]


def plan(ours: KvLayout, theirs: Sequence[KvLayout], reader: Reader) -> tuple[Take, ...]:
    """What to read so that each of our pages is complete. Raises Incompatible if the peer's ranks cannot make it so."""
    if same := [rank for rank, layout in enumerate(theirs) if layout == ours]:
        return (Take(reader.among(same)),)
    for layout in theirs:
        if _kind(layout) != _kind(ours):
            raise Incompatible(f"the peer's pages hold {_kind(layout)}, ours {_kind(ours)}")
    spans: dict[int, list[Span]] = {}
    for index, state in enumerate(ours.state_classes):
        for rank, span in _spans(state, [layout.state_classes[index] for layout in theirs], reader):
            spans.setdefault(rank, []).append(span)
    return tuple(Take(rank, Slices(_merged(found), reader.must_stage)) for rank, found in sorted(spans.items()))


def _kind(layout: KvLayout) -> tuple[object, ...]:
    """What layouts of different ranks have in common."""
    return (layout.page_size, *((state.name, state.num_layers, state.dtype) for state in layout.state_classes))


def _spans(ours: StateClass, theirs: Sequence[StateClass], reader: Reader) -> list[tuple[int, Span]]:
    if not ours.num_heads:
        if any(state.size_bytes != ours.size_bytes for state in theirs):
            raise Incompatible(f"{ours.name} takes other room in the peer's pages")
        rank = reader.among(range(len(theirs)))
        return [(rank, Span(theirs[rank].offset_bytes, ours.offset_bytes, ours.size_bytes))]
    found: list[tuple[int, Span]] = []
    for head in range(ours.first_head, ours.first_head + ours.num_heads):
        have = [rank for rank, s in enumerate(theirs) if s.first_head <= head < s.first_head + s.num_heads]
        if not have or any(_head_bytes(theirs[rank]) != _head_bytes(ours) for rank in have):
            raise Incompatible(f"no rank of the peer has head {head} of {ours.name} as we would store it")
        rank = reader.among(have)
        found.append((rank, _head(ours, theirs[rank], head)))
    return found


def _head_bytes(state: StateClass) -> int:
    return state.size_bytes // state.num_heads


def _head(ours: StateClass, theirs: StateClass, head: int) -> Span:
    """Keys and values of one head in all layers."""
    size = _head_bytes(ours)
    remote, local = (state.offset_bytes + (head - state.first_head) * size for state in (theirs, ours))
    return Span(remote, local, size)


def _merged(spans: list[Span]) -> tuple[Span, ...]:
    """Spans that follow each other on both sides are one."""
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: span.remote):
        last = merged[-1] if merged else None
        if last and (last.remote + last.num_bytes, last.local + last.num_bytes) == (span.remote, span.local):
            merged[-1] = Span(last.remote, last.local, last.num_bytes + span.num_bytes)
        else:
            merged.append(span)
    return tuple(merged)
