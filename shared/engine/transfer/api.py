"""Moving pages between processes by one-sided READ. `nixl.py` and `local.py` are twins behind this protocol."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from shared.engine.transfer.layout_plan import Slices
from shared.errors import BadManifest, Incompatible

# A reader prepares 24 bytes for each page of a peer: 400 MB for so many, which hold 268 million tokens, 16 each.
MAX_POOL_PAGES = 1 << 24


@dataclass(frozen=True, slots=True)
class RemotePool:
    """A peer's pool as the peer described it (PoolShard on the wire)."""

    agent_name: str
    agent_metadata: bytes
    base_address: int
    num_pages: int
    page_bytes: int
    memory_kind: str
    device_id: int


class Peer(Protocol):
    """A connected remote pool."""

    @property
    def pool(self) -> RemotePool:
        """What was connected to."""

    @property
    def is_open(self) -> bool:
        """Whether it can be read. A failed read may close it: disconnect it then, and connect again."""


class Transport(Protocol):
    """One agent of this process, with this process's pool registered for its whole life."""

    name: str
    agent_name: str

    def metadata(self) -> bytes:
        """What a peer needs in order to connect."""

    def serve(self, seconds: float) -> None:
        """Answer peers' connects and reads for this long from now, or a few seconds after the last call that asked for
        more than 0: a peer may be connecting. Each call replaces the one before, and one that asks for more than 0 says
        that a peer may come at any moment; when none does for a while, answers may take some 20 ms.

        Not every path is truly one-sided: where there is no shared memory the owner's CPU takes part in a READ. So an
        owner serves while a lease of its own lives, and sleeps otherwise.
        """

    async def connect(self, pool: RemotePool, timeout_s: float, slices: Slices | None = None) -> Peer:
        """Make a peer's pool readable, and see that it is. The peer must be serving. Of each of its pages `slices` will
        be read, by default all of it.

        Raises TransferFailed (garbage metadata, unreachable, not the peer's memory), Incompatible (another page size,
        an absurd number of pages) or DeadlineExceeded.
        """

    def disconnect(self, peer: Peer) -> None:
        """Forget a peer; unknown peers are ignored. Its reads in flight fail."""

    async def checksums(self, page_ids: Sequence[int]) -> list[int]:
        """Of our own pages, for whoever reads them."""

    async def read(
        self, peer: Peer, remote: Sequence[int], local: Sequence[int], timeout_s: float, checksums: Sequence[int] = ()
    ) -> int:
        """Read the peer's pages `remote` into our pages `local`, in order; return bytes moved.

        With `checksums`, one for each of the peer's pages, what arrived is compared: our pages, or of slices the whole
        pages in the buffer that they are copied out of; only staged slices can be. Raises CorruptPages, Incompatible.

        When this returns or raises, cancellation included, no byte will be written to the local pages any more: that
        is what makes it safe to free them. Raises BadManifest for a page id outside either pool, TransferFailed if
        the peer is gone, DeadlineExceeded after `timeout_s`.
        """

    def close(self) -> None:
        """End the agent. The pool stays where it is."""


def check_pool(pool: RemotePool, page_bytes: int, slices: Slices | None) -> None:
    """Raise Incompatible unless a peer's pages, or the slices of them, fit pages of `page_bytes`, and their number is
    believable."""
    if slices is None and pool.page_bytes != page_bytes:
        raise Incompatible(f"pages of {pool.page_bytes} bytes do not fit pages of {page_bytes}")
    for span in slices.spans if slices else ():
        if span.remote + span.num_bytes > pool.page_bytes or span.local + span.num_bytes > page_bytes:
            raise Incompatible(f"{span} does not lie in pages of {pool.page_bytes} and {page_bytes} bytes")
    if not 0 < pool.num_pages <= MAX_POOL_PAGES:
        raise Incompatible(f"{pool.agent_name} says that it has {pool.num_pages} pages")


def check_verifiable(slices: Slices | None, checksums: Sequence[int]) -> None:
    """Raise Incompatible if checksums of whole pages are of no use for what is read of them."""
    if checksums and slices is not None and not slices.staged:
        raise Incompatible("checksums are of whole pages, and only parts of them are read")


def check_page_ids(pool: RemotePool, remote: Sequence[int], num_local: int, local: Sequence[int]) -> None:
    """Raise BadManifest unless the ids pair up and lie within their pools."""
    if len(remote) != len(local):
        raise BadManifest(f"{len(remote)} remote pages cannot fill {len(local)} local pages")
    for ids, num_pages, whose in ((remote, pool.num_pages, pool.agent_name), (local, num_local, "this worker")):
        if ids and not 0 <= min(ids) <= max(ids) < num_pages:
            raise BadManifest(f"a page id among {min(ids)}..{max(ids)} is outside the {num_pages} pages of {whose}")
