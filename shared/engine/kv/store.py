"""The one owner of a worker's pages."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class PageTable:
    """Pages that a sequence holds, in order. KV of the first `num_tokens` tokens is in them."""

    page_ids: list[int] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages by state. A page that is both held and leased counts as held. free + cached + leased + held = total."""

    free: int
    cached: int
    leased: int
    held: int
    total: int


@dataclass(frozen=True, slots=True)
class IndexEvent:
    """A page became findable under a hash, or ceased to be."""

    page_hash: bytes
    stored: bool


class KvStore:
    """Thread-safe; every method is short and none waits.

    Sequences hold pages through a PageTable, peers through a lease; a page is reusable when nobody does. A page whose
    hash is known stays findable (cached) until the room is needed: least recently used first.
    """

    def __init__(self, num_pages: int, page_size: int, lease_ttl_ms: int) -> None: ...

    def reserve(self, page_hashes: Sequence[bytes], num_pages: int) -> PageTable | None:
        """Hold `num_pages` pages, beginning with the longest cached run of `page_hashes`; None if there is no room."""

    def extend(self, table: PageTable, num_pages: int) -> bool:
        """Hold `num_pages` more; False, and nothing changes, if there is no room."""

    def publish(self, table: PageTable, first_page: int, page_hashes: Sequence[bytes]) -> None:
        """Make full pages of a table findable. A hash that is known already keeps its page."""

    def drop(self, table: PageTable) -> None:
        """Hold no longer. The table is empty afterwards; dropping it again does nothing."""

    def grant(self, page_ids: Sequence[int] = ()) -> int:
        """A new lease on pages that the caller holds."""

    def widen(self, lease_id: int, page_ids: Sequence[int]) -> bool:
        """Add pages that the caller holds to a lease; False if it has ended."""

    def acquire(self, page_hashes: Sequence[bytes]) -> tuple[int, list[int]] | None:
        """Lease the longest cached leading run of `page_hashes`; None if not even the first is cached."""

    def renew(self, lease_id: int) -> bool:
        """Give a lease its full time again; False if it has ended."""

    def release(self, lease_id: int) -> bool:
        """End a lease; whether it had held until now."""

    def match(self, page_hashes: Sequence[bytes]) -> int:
        """Length of the longest cached leading run."""

    def expire(self) -> int:
        """End the leases whose time is up; how many. Called from every other method too."""

    def counts(self) -> PageCounts:
        """Pages by state."""

    def hashes(self) -> list[bytes]:
        """Every findable hash, for a snapshot."""

    def drain_events(self) -> list[IndexEvent]:
        """What changed in the index since the last call, in order."""
