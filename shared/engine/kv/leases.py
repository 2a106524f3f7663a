"""Leases: which pages a peer may read, and until when."""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import count


@dataclass(slots=True)
class Lease:
    """Pages in sequence order (a dict, so that none is in it twice), and the time of the clock at which it ends."""

    pages: dict[int, None]
    ends_at: float


@dataclass(frozen=True, slots=True)
class LeaseCounts:
    """Leases that were ever granted, those of them whose time ran out, and those alive."""

    granted: int
    lapsed: int
    live: int


class LeaseBook:
    """Live leases, the first to end first: all have the same time to live. Guarded by KvStore's lock."""

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._ids = count(1)
        self._leases: OrderedDict[int, Lease] = OrderedDict()
        self._num_granted = self._num_lapsed = 0

    def open(self) -> int:
        """A new lease, on no page yet."""
        lease_id = next(self._ids)
        self._num_granted += 1
        self._leases[lease_id] = Lease({}, self._clock() + self._ttl_s)
        return lease_id

    def widen(self, lease_id: int, page_ids: Iterable[int]) -> list[int] | None:
        """Add pages; those that are new to the lease, or None if it has ended."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return None
        new = [page_id for page_id in dict.fromkeys(page_ids) if page_id not in lease.pages]
        lease.pages.update(dict.fromkeys(new))
        return new

    def renew(self, lease_id: int) -> bool:
        """Give a lease its full time again; False if it has ended."""
        lease = self._leases.get(lease_id)
        if lease is None:
            return False
        lease.ends_at = self._clock() + self._ttl_s
        self._leases.move_to_end(lease_id)
        return True

    def close(self, lease_id: int) -> list[int] | None:
        """End a lease; its pages, or None if it has ended already."""
        lease = self._leases.pop(lease_id, None)
        return None if lease is None else list(lease.pages)

    def lapse(self) -> list[list[int]]:
        """End the leases whose time is up; the pages of each."""
        lapsed: list[list[int]] = []
        if not self._leases:
            return lapsed
        now = self._clock()
        while self._leases and (first := next(iter(self._leases.values()))).ends_at <= now:
            self._leases.popitem(last=False)
            lapsed.append(list(first.pages))
        self._num_lapsed += len(lapsed)
        return lapsed

    def counts(self) -> LeaseCounts:
        """How leases have fared."""
        return LeaseCounts(self._num_granted, self._num_lapsed, len(self._leases))

    def next_end_s(self) -> float | None:
        """Seconds until the first lease ends unless renewed; None if there is none."""
        if not self._leases:
            return None
        return max(0.0, next(iter(self._leases.values())).ends_at - self._clock())
