"""Pages that workers will have cached soon: those of prompts that were placed on them and are yet to be computed.

The prefix index tells of a page a moment after it was computed, and computing takes a while; of a burst of prompts that
begin alike all would be placed as if nobody had their prefix. So a placement says what its worker is going to have, and
whoever comes next weighs its queue against that. A prediction is forgotten when the index has had time to confirm it.

Page hashes are chained: who has a page has all before it. So a few *marks* of each prompt are enough to remember, at
places that are the same for all prompts.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

from services.router.page_index import Ints
from shared.page_hash import HASH_BYTES

Incarnation = tuple[str, int]

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


class Predictions:
    """Belongs to one event loop. Times are those of the caller's clock, in seconds."""

    def __init__(self) -> None:
        self._spans: dict[bytes, dict[Incarnation, tuple[float, float]]] = {}
        self._until: dict[bytes, float] = {}
        """When the last span of each mark ends; those that ended before stay until then."""
        self._ends: list[tuple[float, int, Sequence[bytes]]] = []
        self._num_added = 0

    def __len__(self) -> int:
        return len(self._spans)

    def add(self, marked: Sequence[bytes], begins: Mapping[Incarnation, float], computed_at: float, now: float) -> None:
        """Each worker counts from its time on as having a prompt with these marks, which is computed at
        `computed_at`."""
        end = computed_at + GRACE_S
        self.forget(now)
        if end > now + MAX_AHEAD_S or len(self._spans) + len(marked) > MAX_MARKS:
            return
        added = {worker: (begin, end) for worker, begin in begins.items()}
        for mark in marked:
            if (spans := self._spans.get(mark)) is None:
                self._spans[mark], self._until[mark] = added.copy(), end
                continue
            self._until[mark] = max(end, self._until[mark])
            for worker, span in added.items():
                if (earlier := spans.get(worker)) and earlier[1] > now:
                    spans[worker] = (min(span[0], earlier[0]), max(end, earlier[1]))
                else:
                    spans[worker] = span
        self._num_added += 1
        heapq.heappush(self._ends, (end, self._num_added, marked))

    def forget(self, now: float) -> None:
        """Drop what is over."""
        while self._ends and self._ends[0][0] <= now:
            for mark in heapq.heappop(self._ends)[2]:
                if self._until.get(mark, math.inf) <= now:
                    del self._spans[mark], self._until[mark]

    def raise_runs(self, runs: Ints, page_hashes: bytes, row_of: Mapping[Incarnation, int], now: float) -> Ints:
        """Leading pages that each worker has [workers], or is going to: `runs` itself if no prediction says more."""
        self.forget(now)
        known = self._known(page_hashes) if self._spans else []
        # Who has a later mark has the first, for no shorter time.
        sought = {worker for _, spans in known[:1] for worker, (begin, end) in spans.items() if begin <= now < end}
        raised = runs
        for at, spans in reversed(known):
            for worker in sought.intersection(spans):
                begin, end = spans[worker]
                if not begin <= now < end:
                    continue
                sought.discard(worker)
                row = row_of.get(worker)
                if row is not None and raised[row] <= at:
                    raised = runs.copy() if raised is runs else raised
                    raised[row] = at + 1
            if not sought:
                break
        return raised

    def _known(self, page_hashes: bytes) -> list[tuple[int, dict[Incarnation, tuple[float, float]]]]:
        """The leading marks of a prompt that anybody is predicted to have: at which page, and who."""
        known = []
        for at in places(len(page_hashes) // HASH_BYTES):
            spans = self._spans.get(page_hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES])
            if spans is None:
                break
            known.append((at, spans))
        return known
