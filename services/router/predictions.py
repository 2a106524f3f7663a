"""Pages that workers will have cached soon: those of prompts that were placed on them and are yet to be computed.

The prefix index tells of a page a moment after it was computed, and computing takes a while; of a burst of prompts that
begin alike all would be placed as if nobody had their prefix. So a placement says what its worker is going to have, and
whoever comes next weighs its queue against that. A prediction is forgotten when the index has had time to confirm it.

Page hashes are chained: who has a page has all before it. So a few *marks* of each prompt are enough to remember, at
places that are the same for all prompts.
"""

import heapq
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from services.router.page_index import Ints
from shared.page_hash import HASH_BYTES

Incarnation = tuple[str, int]
Span = tuple[float, float]

# Marks lie this many pages apart up to the first number of pages, and behind it so many.
NEAR, NEAR_END, FAR = 8, 64, 64
# A prediction outlives the time at which its prompt should be computed by so much: the index needs 0.1 s to tell.
GRACE_S = 2.0
# A prompt that will be computed later than this is not predicted: too much may happen until then.
MAX_AHEAD_S = 60.0
# 40 MB or so.
MAX_MARKS = 100_000


@lru_cache(maxsize=4_096)
def places(num_pages: int) -> tuple[int, ...]:
    """Which pages of so many are marks, from the first on."""
    near, far = range(NEAR, min(num_pages, NEAR_END), NEAR), range(NEAR_END, num_pages, FAR)
    return tuple(length - 1 for length in (*near, *far, num_pages) if length)


def marks(page_hashes: bytes) -> list[bytes]:
    """The marks of a prompt with these pages, concatenated hashes."""
    return [page_hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES] for at in places(len(page_hashes) // HASH_BYTES)]


class Known(NamedTuple):
    """What is predicted of a mark: from when until when each worker counts as having it, and when the last of these
    spans ends; those that ended before stay until then. Never changed: marks that stand for the same prompts share it.
    """

    spans: Mapping[Incarnation, Span]
    until: float


class Predictions:
    """Belongs to one event loop. Times are those of the caller's clock, in seconds."""

    def __init__(self) -> None:
        self._known: dict[bytes, Known] = {}
        self._ends: list[tuple[float, int, Sequence[bytes]]] = []
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._known)

    def add(self, marked: Sequence[bytes], begins: Mapping[Incarnation, float], computed_at: float, now: float) -> None:
        """Each worker counts from its time on as having a prompt with these marks, which is computed at
        `computed_at`."""
        end = computed_at + GRACE_S
        self.forget(now)
        if end > now + MAX_AHEAD_S or len(self._known) + len(marked) > MAX_MARKS:
            return
        before = None
        after = added = Known({worker: (begin, end) for worker, begin in begins.items()}, end)
        for mark in marked:
            known = self._known.get(mark)
            if known is not before:
                before, after = known, _merged(known, added, now) if known else added
            self._known[mark] = after
        self._num_added += 1
        heapq.heappush(self._ends, (end, self._num_added, marked))

    def forget(self, now: float) -> None:
        """Drop what is over."""
        while self._ends and self._ends[0][0] <= now:
            for mark in heapq.heappop(self._ends)[2]:
                if (known := self._known.get(mark)) and known.until <= now:
                    del self._known[mark]

    def raise_runs(self, runs: Ints, page_hashes: bytes, row_of: Mapping[Incarnation, int], now: float) -> Ints:
        """Leading pages that each worker has [workers], or is going to: `runs` itself if no prediction says more."""
        self.forget(now)
        if not self._known or not (marked := places(len(page_hashes) // HASH_BYTES)):
            return runs

        def known(number: int) -> Known | None:
            at = marked[number] * HASH_BYTES
            return self._known.get(page_hashes[at : at + HASH_BYTES])

        if (first := known(0)) is None:
            return runs
        # Who has a later mark has the first, for no shorter time; so marks are known up to one and no further.
        sought = {
            worker: row
            for worker, (begin, end) in first.spans.items()
            if begin <= now < end and (row := row_of.get(worker)) is not None
        }
        num_known = bisect_left(range(len(marked)), True, lo=1, key=lambda number: known(number) is None)
        raised, behind = runs, None
        while sought and num_known:
            num_known -= 1
            here, at = known(num_known), marked[num_known]
            if here is None or here is behind:
                continue
            behind = here
            for worker in sought.keys() & here.spans.keys():
                begin, end = here.spans[worker]
                if begin <= now < end and raised[row := sought.pop(worker)] <= at:
                    raised = runs.copy() if raised is runs else raised
                    raised[row] = at + 1
        return raised


def _merged(known: Known, added: Known, now: float) -> Known:
    """What is known of a mark, and what is added."""
    spans = dict(known.spans)
    for worker, (begin, end) in added.spans.items():
        earlier = spans.get(worker)
        if earlier is not None and earlier[1] > now:
            begin, end = min(begin, earlier[0]), max(end, earlier[1])  # noqa: PLW2901
        spans[worker] = (begin, end)
    return Known(spans, max(known.until, added.until))
