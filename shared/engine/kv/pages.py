"""The states of pages, and the transitions between them.

         take                  let go of, and findable
free ───────────▶ held/leased ───────────────────────▶ cached
 ▲                  │     ▲           hold, lease         │ │
 │                  │     └──────────────────────────────┘ │
 └──────────────────┴───────────────────────────────────────┘
  let go of, not findable                take (evict), reset
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from shared.engine.kv.prefix import PrefixIndex


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages by state. A page that is both held and leased counts as held. free + cached + leased + held = total."""

    free: int
    cached: int
    leased: int
    held: int
    total: int


class PagePool:
    """Counts who uses each page: sequences hold, peers lease. Not thread-safe: KvStore's lock guards it.

    Cached pages are evicted least recently used first. Letting go of a page makes its whole prefix more recent than
    itself, so a prefix always outlives what continues it.
    """

    def __init__(self, num_pages: int, index: PrefixIndex) -> None:
        self._index = index
        self._holds = [0] * num_pages
        self._leases = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._num_held = 0
        self._num_leased = 0
        self.num_freed = 0

    @property
    def num_available(self) -> int:
        """Pages that can be taken: free and cached ones."""
        return len(self._free) + len(self._cached)

    def num_idle(self, page_ids: Iterable[int]) -> int:
        """How many of these pages are cached: holding them makes so many fewer available."""
        return sum(page_id in self._cached for page_id in page_ids)

    def are_used(self, page_ids: Iterable[int]) -> bool:
        """Whether somebody holds or leases each of these pages."""
        holds, leases, num_pages = self._holds, self._leases, len(self._holds)
        return all(0 <= page_id < num_pages and (holds[page_id] or leases[page_id]) for page_id in page_ids)

    def take(self, num_pages: int) -> list[int]:
        """Pages to write to, held once; the caller has checked that there are enough."""
        taken = [self._free.pop() if self._free else self._evict() for _ in range(num_pages)]
        for page_id in taken:
            self._holds[page_id] = 1
        self._num_held += num_pages
        return taken

    def hold(self, page_ids: Iterable[int]) -> None:
        """One more sequence uses these pages as they are."""
        for page_id in page_ids:
            self._cached.pop(page_id, None)
            if not self._holds[page_id]:
                self._num_held += 1
                self._num_leased -= self._leases[page_id] > 0
            self._holds[page_id] += 1

    def lease(self, page_ids: Iterable[int]) -> None:
        """One more lease covers these pages."""
        for page_id in page_ids:
            self._cached.pop(page_id, None)
            if not (self._leases[page_id] or self._holds[page_id]):
                self._num_leased += 1
            self._leases[page_id] += 1

    def unhold(self, page_ids: Sequence[int]) -> None:
        """A sequence lets go of these pages, given in its order."""
        for page_id in page_ids:
            self._holds[page_id] -= 1
            if not self._holds[page_id]:
                self._num_held -= 1
                self._num_leased += self._leases[page_id] > 0
        self._settle(page_ids)

    def unlease(self, page_ids: Sequence[int]) -> None:
        """A lease on these pages, given in their sequence's order, has ended."""
        for page_id in page_ids:
            self._leases[page_id] -= 1
            if not (self._leases[page_id] or self._holds[page_id]):
                self._num_leased -= 1
        self._settle(page_ids)

    def counts(self) -> PageCounts:
        """Pages by state, each counted by itself, so that the sum can be checked."""
        return PageCounts(
            free=len(self._free),
            cached=len(self._cached),
            leased=self._num_leased,
            held=self._num_held,
            total=len(self._holds),
        )

    def faults(self) -> list[str]:
        """What is wrong with the books; empty if nothing is. Looks at every page."""
        users = zip(self._holds, self._leases, strict=True)
        used = [page_id for page_id, (holds, leases) in enumerate(users) if holds or leases]
        held = len(self._holds) - self._holds.count(0)
        ages = {page_id: age for age, page_id in enumerate(self._cached)}
        lines = {page_id: list(islice(self._index.lineage(page_id), 2)) for page_id in ages}
        statements = {
            "a count of users is negative": min(*self._holds, *self._leases, 0) < 0,
            "a page is in two states, or in none": sorted([*self._free, *ages, *used]) != list(range(len(self._holds))),
            "the number of held pages is wrong": held != self._num_held,
            "the number of leased pages is wrong": len(used) - held != self._num_leased,
            "a free page has a name": any(map(self._index.name, self._free)),
            "a cached page cannot be found": any(line[:1] != [page_id] for page_id, line in lines.items()),
            "a cached page is older than its continuation": any(
                ages.get(parent, ages[page_id]) < ages[page_id]
                for page_id, line in lines.items()
                for parent in line[1:]
            ),
        }
        return [statement for statement, wrong in statements.items() if wrong]

    def _is_used(self, page_id: int) -> bool:
        return bool(self._holds[page_id] or self._leases[page_id])

    def _evict(self) -> int:
        page_id, _ = self._cached.popitem(last=False)
        self._index.forget(page_id)
        return page_id

    def _settle(self, page_ids: Sequence[int]) -> None:
        """Put pages that nobody uses any more where they belong, and their prefixes behind them in the queue."""
        for page_id in page_ids:
            if not self._is_used(page_id):
                self._retire(page_id)
        touched: set[int] = set()
        for page_id in reversed(page_ids):
            if page_id not in touched:
                touched.update(self._touch(page_id))

    def _retire(self, page_id: int) -> None:
        self.num_freed += 1
        if self._index.keeps(page_id):
            self._cached[page_id] = None
        else:
            self._index.forget(page_id)
            self._free.append(page_id)

    def _touch(self, page_id: int) -> list[int]:
        line = list(self._index.lineage(page_id))
        for ancestor in line:
            if ancestor in self._cached:
                self._cached.move_to_end(ancestor)
        return line
