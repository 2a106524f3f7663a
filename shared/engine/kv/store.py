"""The one owner of a worker's pages."""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from shared.engine.kv.leases import LeaseBook, LeaseCounts
from shared.engine.kv.pages import PageCounts, PagePool
from shared.engine.kv.prefix import IndexEvent, PrefixIndex
from shared.errors import Internal


@dataclass(slots=True)
class PageTable:
    """Pages that a sequence holds, in order. KV of the first `num_tokens` tokens is in them."""

    page_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0

    def move(self) -> "PageTable":
        """The same pages under a new owner; this table is empty afterwards, so that dropping it does nothing."""
        moved = PageTable(self.page_ids, self.num_tokens)
        self.page_ids, self.num_tokens = [], 0
        return moved


class KvStore:
    """Thread-safe; every method is short and none waits.

    Sequences hold pages through a PageTable, peers through a lease; a page is reusable when nobody does. A page whose
    hash is known stays findable (cached) until the room is needed: least recently used first, a prefix after what
    continues it.

    `on_capacity`, if set, is called after pages became available, outside the lock, by the thread that freed them; so
    is `on_events` when the first change of the index is there since `drain_events`.
    Leases that lapse unseen free nothing until some method is called: whoever waits for room looks again after
    `next_lease_end_s`.
    """

    def __init__(
        self, num_pages: int, page_size: int, lease_ttl_ms: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.lease_ttl_ms = lease_ttl_ms
        self.on_capacity: Callable[[], None] | None = None
        self.on_events: Callable[[], None] | None = None
        self._index = PrefixIndex()
        self._pages = PagePool(num_pages, self._index)
        self._leases = LeaseBook(lease_ttl_ms / 1000, clock)
        self._section = _Section(self._pages, self._leases, self._index, self._say)

    # Pages held by sequences ------------------------------------------------------------------------------------------

    def reserve(self, page_hashes: Sequence[bytes], num_pages: int, num_spare: int = 0) -> PageTable | None:
        """Hold `num_pages` pages, beginning with the longest cached run of `page_hashes`; None if there is no room.

        `num_spare` pages must stay available afterwards.
        """
        with self._section:
            run = self._index.run(page_hashes[:num_pages])
            num_new = num_pages - len(run)
            if num_new + self._pages.num_idle(run) + num_spare > self._pages.num_available:
                return None
            self._pages.hold(run)
            return PageTable(run + self._pages.take(num_new), len(run) * self.page_size)

    def extend(self, table: PageTable, num_pages: int, num_spare: int = 0) -> bool:
        """Hold `num_pages` more; False, and nothing changes, if there is no room. `num_spare` pages must stay available
        afterwards."""
        with self._section:
            if num_pages + num_spare > self._pages.num_available:
                return False
            table.page_ids += self._pages.take(num_pages)
            return True

    def adopt(self, table: PageTable, page_hashes: Sequence[bytes]) -> None:
        """Put cached pages in the place of a table's own that are yet to be computed: others with the same prompt may
        have computed them since it was reserved. Its own must be new, and unknown to anybody."""
        with self._section:
            first, part = divmod(table.num_tokens, self.page_size)
            run = self._index.run(page_hashes[: len(table.page_ids)])
            if part or len(run) <= first:
                return
            spared = table.page_ids[first : len(run)]
            self._pages.hold(run[first:])
            table.page_ids[first : len(run)] = run[first:]
            table.num_tokens = len(run) * self.page_size
            self._pages.unhold(spared)

    def shrink(self, table: PageTable, num_tokens: int) -> None:
        """Hold only the pages of the first `num_tokens` tokens."""
        with self._section:
            num_kept = -(-num_tokens // self.page_size)
            self._pages.unhold(table.page_ids[num_kept:])
            del table.page_ids[num_kept:]
            table.num_tokens = min(table.num_tokens, num_tokens)

    def publish(self, table: PageTable, first_page: int, page_hashes: Sequence[bytes]) -> None:
        """Make full pages of a table findable. A hash that is known already keeps its page."""
        with self._section:
            parent = self._index.name(table.page_ids[first_page - 1]) if first_page else b""
            for page_id, page_hash in zip(table.page_ids[first_page:], page_hashes, strict=False):
                self._index.add(page_id, page_hash, parent)
                parent = page_hash

    def drop(self, table: PageTable) -> None:
        """Hold no longer. The table is empty afterwards; dropping it again does nothing."""
        with self._section:
            self._pages.unhold(table.move().page_ids)

    # Pages leased by peers --------------------------------------------------------------------------------------------

    def grant(self, page_ids: Sequence[int] = ()) -> int:
        """A new lease on pages that the caller holds."""
        with self._section:
            self._require_used(page_ids)
            lease_id = self._leases.open()
            self._widen(lease_id, page_ids)
            return lease_id

    def widen(self, lease_id: int, page_ids: Sequence[int]) -> bool:
        """Add pages that the caller holds to a lease; False if it has ended."""
        with self._section:
            self._require_used(page_ids)
            return self._widen(lease_id, page_ids)

    def acquire(self, page_hashes: Sequence[bytes]) -> tuple[int, list[int]] | None:
        """Lease the longest cached leading run of `page_hashes`; None if not even the first is cached."""
        with self._section:
            run = self._index.run(page_hashes)
            if not run:
                return None
            lease_id = self._leases.open()
            self._widen(lease_id, run)
            return lease_id, run

    def renew(self, lease_id: int) -> bool:
        """Give a lease its full time again; False if it has ended."""
        with self._section:
            return self._leases.renew(lease_id)

    def release(self, lease_id: int, read: Iterable[int] = ()) -> bool:
        """End a lease; whether it had held until now, on every page of `read`."""
        with self._section:
            page_ids = self._leases.close(lease_id)
            self._pages.unlease(page_ids or ())
            return page_ids is not None and set(read).issubset(page_ids)

    def expire(self) -> int:
        """End the leases whose time is up; how many. Called from every other method too."""
        with self._section as num_lapsed:
            return num_lapsed

    def next_lease_end_s(self) -> float | None:
        """Seconds until the first lease lapses unless renewed; None if there is none."""
        with self._section:
            return self._leases.next_end_s()

    # What there is ----------------------------------------------------------------------------------------------------

    def match(self, page_hashes: Sequence[bytes]) -> int:
        """Length of the longest cached leading run."""
        with self._section:
            return len(self._index.run(page_hashes))

    def counts(self) -> PageCounts:
        """Pages by state."""
        with self._section:
            return self._pages.counts()

    def lease_counts(self) -> LeaseCounts:
        """How leases have fared."""
        with self._section:
            return self._leases.counts()

    def num_freed(self) -> int:
        """Pages that became available, ever. Whoever found no room need not look again while this stays the same."""
        with self._section:
            return self._pages.num_freed

    def check(self) -> list[str]:
        """What is wrong with the books, in words; empty if nothing is. Looks at every page."""
        with self._section:
            return self._pages.faults()

    def hashes(self) -> list[bytes]:
        """Every findable hash, for a snapshot."""
        with self._section:
            return self._index.hashes()

    def drain_events(self) -> list[IndexEvent]:
        """Net changes in the index since the last call."""
        with self._section:
            return self._index.drain()

    def _widen(self, lease_id: int, page_ids: Sequence[int]) -> bool:
        new = self._leases.widen(lease_id, page_ids)
        self._pages.lease(new or ())
        return new is not None

    def _require_used(self, page_ids: Sequence[int]) -> None:
        if not self._pages.are_used(page_ids):
            raise Internal(f"pages {list(page_ids)} are to be leased, but nobody holds them all")

    def _say(self, freed: bool, changed: bool) -> None:
        if freed and self.on_capacity is not None:
            self.on_capacity()
        if changed and self.on_events is not None:
            self.on_events()


class _Section:
    """The lock, with lapsed leases ended first (entering says how many); afterwards, outside it, word of pages that
    were freed, and of an index that has changed.

    Not a generator: every method enters it, many of them before a first token, and a generator takes thrice as long.
    """

    def __init__(
        self, pages: PagePool, leases: LeaseBook, index: PrefixIndex, say: Callable[[bool, bool], None]
    ) -> None:
        self._lock = threading.Lock()
        self._pages, self._leases, self._index, self._say = pages, leases, index, say
        self._num_freed, self._had_changed = 0, False

    def __enter__(self) -> int:
        self._lock.acquire()
        self._num_freed, self._had_changed = self._pages.num_freed, self._index.has_changed
        try:
            lapsed = self._leases.lapse()
            for page_ids in lapsed:
                self._pages.unlease(page_ids)
        except BaseException:
            self._lock.release()
            raise
        return len(lapsed)

    def __exit__(self, *_error: object) -> None:
        freed = self._pages.num_freed > self._num_freed
        changed = self._index.has_changed and not self._had_changed
        self._lock.release()
        if freed or changed:
            self._say(freed, changed)
