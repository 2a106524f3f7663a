"""The router's copy of the prefix index: fed with changes and snapshots, asked for prefixes. No Redis in here.

Every worker's incarnation has a slot of the page index. Changes are numbered; a number that is missing, or word that a
set was written anew, puts the worker in doubt: its set is then read again into a second slot, changes that come
meanwhile are kept for it, and the second slot takes the first one's place when it is complete. The first answers until
then, for it is nearly right. Slots that nobody uses any more are cleared bit by bit, and then given to others.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.router.page_index import SLOTS_PER_WORD, Ints, PageIndex, keys_of
from shared.blackboard.index import IndexEvent, IndexPart
from shared.page_hash import HASH_BYTES

Incarnation = tuple[str, int]
"""Name and epoch of a worker."""

# Segments to clear at once: a fraction of a millisecond.
SEGMENTS_PER_TIDYING = 16


@dataclass(slots=True)
class Snapshot:
    """A worker's set on its way here: what came up to `cursor`, and changes behind number `number`, in order."""

    slot: int
    number: int
    cursor: int = 0
    changes: list[IndexEvent] = field(default_factory=list)


@dataclass(slots=True)
class Copy:
    """What is known of one incarnation's pages. `number` is that of its last change seen, -1 before any is known."""

    slot: int
    number: int = -1
    doubted: bool = True
    known: bool = False
    snapshot: Snapshot | None = None
    audited: int = 0


class Slots:
    """Slots of an index that are free, and those to be cleared before they are."""

    def __init__(self, index: PageIndex) -> None:
        self._index = index
        self._free = list(range(index.num_words * SLOTS_PER_WORD))
        self._used_up: list[int] = []
        self._clearing: list[int] = []
        self._next_segment = 0

    def take(self) -> int:
        """An empty slot."""
        if not self._free:
            first = self._index.num_words * SLOTS_PER_WORD
            self._index.widen(self._index.num_words + 1)
            self._free = list(range(first, first + SLOTS_PER_WORD))
        return self._free.pop()

    def give_back(self, slot: int) -> None:
        """Nobody adds to this slot or asks for it any more."""
        self._used_up.append(slot)

    @property
    def are_tidy(self) -> bool:
        """Whether there is nothing to clear."""
        return not (self._clearing or self._used_up)

    def tidy(self) -> None:
        """Clear a part of what was given back."""
        if not self._clearing:
            if not self._used_up:
                return
            self._clearing, self._used_up, self._next_segment = self._used_up, [], 0
        slots = np.array(self._clearing)
        end = min(self._next_segment + SEGMENTS_PER_TIDYING, self._index.num_segments)
        for segment in range(self._next_segment, end):
            self._index.clear(slots, segment)
        self._next_segment = end
        if end == self._index.num_segments:  # a segment that splits leaves its half behind this place
            self._free += self._clearing
            self._clearing = []


class Mirror:
    """Belongs to one event loop; no method waits."""

    def __init__(self, max_pages: int) -> None:
        self._index = PageIndex(max_pages)
        self._slots = Slots(self._index)
        self._copies: dict[Incarnation, Copy] = {}
        self._asked: Sequence[Incarnation] | None = None
        self._asked_slots: Ints = np.empty(0, np.int64)
        """The slots of the workers that were asked for last: they seldom change."""
        self._is_any_unknown = False

    @property
    def num_pages(self) -> int:
        """Pages that somebody has."""
        return self._index.num_pages

    @property
    def num_bytes(self) -> int:
        """Memory that they take."""
        return self._index.num_bytes

    @property
    def is_complete(self) -> bool:
        """Whether every worker's set has been read once, as far as there is one."""
        return all(copy.known for copy in self._copies.values())

    def track(self, workers: Iterable[Incarnation]) -> None:
        """From now on mirror these and no others."""
        wanted = set(workers)
        if wanted != self._copies.keys():
            self._asked = None
        for worker in self._copies.keys() - wanted:
            copy = self._copies.pop(worker)
            self._abandon(copy)
            self._slots.give_back(copy.slot)
        for worker in sorted(wanted - self._copies.keys()):
            self._copies[worker] = Copy(self._slots.take())

    def doubt(self) -> None:
        """Changes may have been missed: every set is to be read again."""
        for copy in self._copies.values():
            self._doubt(copy)

    def audit(self, numbers: dict[Incarnation, int]) -> None:
        """Compare with how many changes there were by now: a worker whose changes of the audit before have still not
        come, or whose count was started over, is in doubt."""
        for worker, number in numbers.items():
            if (copy := self._copies.get(worker)) and copy.known and not copy.snapshot:
                if copy.number < min(copy.audited, number) or number < copy.number:
                    self._doubt(copy)
                copy.audited = number

    # Snapshots --------------------------------------------------------------------------------------------------------

    def wanted(self) -> tuple[str, int, int] | None:
        """The part to read next: name, epoch and cursor."""
        for (name, epoch), copy in self._copies.items():
            if copy.snapshot:
                return name, epoch, copy.snapshot.cursor
        return next(((*worker, 0) for worker, copy in self._copies.items() if copy.doubted), None)

    def take(self, worker: Incarnation, cursor: int, part: IndexPart) -> None:
        """The part that was wanted. It must have been read behind all events that were applied so far."""
        copy = self._copies.get(worker)
        if copy is None or (copy.snapshot.cursor if copy.snapshot else 0) != cursor:
            return  # it left, or its snapshot has to begin anew
        if not part.complete:  # the worker will write it, and say so on the stream
            self._abandon(copy)
            copy.doubted, copy.known = False, True
            return
        if copy.snapshot is None:
            copy.snapshot, copy.doubted = Snapshot(self._slots.take(), part.number), False
        copy.snapshot.cursor = part.cursor
        self._change(copy.snapshot.slot, part.hashes, stored=True)
        if part.cursor == 0:
            self._complete(copy, copy.snapshot)

    def _complete(self, copy: Copy, snapshot: Snapshot) -> None:
        self._slots.give_back(copy.slot)
        self._asked = None
        copy.slot, copy.number, copy.known, copy.snapshot = snapshot.slot, snapshot.number, True, None
        copy.audited = 0
        for event in snapshot.changes:
            self._follow(copy, event)

    def _doubt(self, copy: Copy) -> None:
        self._abandon(copy)
        copy.doubted = True

    def _abandon(self, copy: Copy) -> None:
        if copy.snapshot:
            self._slots.give_back(copy.snapshot.slot)
            copy.snapshot = None

    # Changes ----------------------------------------------------------------------------------------------------------

    def apply(self, events: Iterable[IndexEvent]) -> None:
        """Changes, as they come on the stream."""
        for event in events:
            if copy := self._copies.get((event.name, event.epoch)):
                if event.replaced and not (copy.snapshot and event.number <= copy.snapshot.number):
                    self._doubt(copy)
                elif copy.snapshot:
                    copy.snapshot.changes.append(event)
                self._follow(copy, event)

    def _follow(self, copy: Copy, event: IndexEvent) -> None:
        """Apply a change, unless it was applied before."""
        if event.number <= copy.number:
            return
        if copy.number >= 0 and event.number > copy.number + 1:
            self._doubt(copy)
        copy.number = event.number
        self._change(copy.slot, event.stored, stored=True)
        self._change(copy.slot, event.removed, stored=False)

    def _change(self, slot: int, hashes: bytes, *, stored: bool) -> None:
        pages = keys_of(hashes[: len(hashes) // HASH_BYTES * HASH_BYTES])
        if len(pages):
            change = self._index.add if stored else self._index.discard
            change(pages, np.full(len(pages), slot))

    @property
    def is_tidy(self) -> bool:
        """Whether there is no housekeeping to be done."""
        return self._slots.are_tidy

    def tidy(self) -> None:
        """A little housekeeping, to be called again and again."""
        self._slots.tidy()

    # Lookups ----------------------------------------------------------------------------------------------------------

    def runs(self, page_hashes: bytes, workers: Sequence[Incarnation]) -> Ints:
        """How many leading pages of the concatenated hashes each worker has: [workers]."""
        if self._asked is not workers:
            slots = [copy.slot if (copy := self._copies.get(worker)) else -1 for worker in workers]
            self._asked, self._asked_slots = workers, np.array(slots, np.int64)
            self._is_any_unknown = -1 in slots
        lengths = self._index.runs(keys_of(page_hashes))
        if self._is_any_unknown:
            lengths = np.append(lengths, 0)  # who is not tracked has slot -1, the last one
        return lengths.take(self._asked_slots)
