"""The pools of a worker's ranks as one: pages have the same numbers in all of them, and are read in all of them."""

import asyncio
import zlib
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from shared.engine.kv.layout import KvLayout
from shared.engine.kv.memory import PoolMemory
from shared.engine.transfer.api import Peer, RemotePool, Transport
from shared.engine.transfer.layout_plan import Reader, Take, plan
from shared.errors import BadManifest, Incompatible


@dataclass(frozen=True, slots=True)
class RankPool:
    """One rank's pool as others see it, and how its pages are laid out."""

    pool: RemotePool
    layout: KvLayout


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of ours: its pool, and the transport that reads into it."""

    transport: Transport
    own: RankPool


@dataclass(frozen=True, slots=True)
class Link:
    """Our rank `rank` reads from the peer's rank `theirs` over this."""

    rank: int
    theirs: int
    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerPools:
    """A connected worker of so many ranks."""

    links: tuple[Link, ...]
    num_ranks: int

    @property
    def is_open(self) -> bool:
        """Whether it can be read."""
        return all(link.peer.is_open for link in self.links)


class Pools:
    """The ranks of this worker, by rank."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._members = list(members)
        self._salt = zlib.crc32(self.name.encode() + members[0].own.pool.agent_name.encode())

    @property
    def name(self) -> str:
        """Of the transport."""
        return self._members[0].transport.name

    def describe(self) -> list[RankPool]:
        """What a peer needs in order to connect."""
        return [member.own for member in self._members]

    def serve(self, seconds: float) -> None:
        """See `Transport.serve`."""
        for member in self._members:
            member.transport.serve(seconds)

    async def connect(self, theirs: Sequence[RankPool], timeout_s: float, *, checksums: bool = False) -> PeerPools:
        """Connect each rank of ours to those of a peer that it has something to take from, which may give checksums of
        its pages. As `Transport.connect`."""
        if not theirs or len({pool.pool.num_pages for pool in theirs}) > 1:
            raise Incompatible("the peer's ranks have pools of different sizes, or there are none")
        takes = [(rank, take) for rank in range(len(self._members)) for take in self._plan(rank, theirs, checksums)]
        links: list[Link] = []
        try:
            await _all([self._connect(rank, take, theirs, timeout_s, links) for rank, take in takes])
        except BaseException:
            self.disconnect(PeerPools(tuple(links), len(theirs)))
            raise
        return PeerPools(tuple(links), len(theirs))

    def _plan(self, rank: int, theirs: Sequence[RankPool], checksums: bool) -> tuple[Take, ...]:
        own = self._members[rank].own
        reader = Reader(rank, len(self._members), self._salt, must_stage=checksums)
        return plan(own.layout, [pool.layout for pool in theirs], reader)

    async def _connect(
        self, rank: int, take: Take, theirs: Sequence[RankPool], timeout_s: float, links: list[Link]
    ) -> None:
        transport = self._members[rank].transport
        links.append(Link(rank, take.rank, await transport.connect(theirs[take.rank].pool, timeout_s, take.slices)))

    def disconnect(self, peer: PeerPools) -> None:
        """See `Transport.disconnect`."""
        for link in peer.links:
            self._members[link.rank].transport.disconnect(link.peer)

    async def checksums(self, page_ids: Sequence[int]) -> list[int]:
        """Of each page one for every rank, page after page."""
        by_rank = await _all([member.transport.checksums(page_ids) for member in self._members])
        return [checksum for page in zip(*by_rank, strict=True) for checksum in page]

    async def read(
        self,
        peer: PeerPools,
        remote: Sequence[int],
        local: Sequence[int],
        timeout_s: float,
        checksums: Sequence[int] = (),
    ) -> int:
        """As `Transport.read`, in every rank; returns only when nothing is written in any of them any more. `checksums`
        are as the peer's `Pools.checksums` made them: each of our ranks compares the pages of the ranks that it reads.
        """
        if len(checksums) not in (0, len(remote) * peer.num_ranks):
            raise BadManifest(f"{len(checksums)} checksums for {len(remote)} pages of {peer.num_ranks} ranks")
        reads = [
            self._members[link.rank].transport.read(
                link.peer, remote, local, timeout_s, checksums[link.theirs :: peer.num_ranks]
            )
            for link in peer.links
        ]
        return sum(await _all(reads))


def own_pool(transport: Transport, memory: PoolMemory, layout: KvLayout) -> RankPool:
    """How a process describes its own pool."""
    pool = RemotePool(
        agent_name=transport.agent_name,
        agent_metadata=transport.metadata(),
        base_address=memory.address,
        num_pages=memory.num_pages,
        page_bytes=memory.page_bytes,
        memory_kind=memory.kind,
        device_id=memory.device_id,
    )
    return RankPool(pool, layout)


async def _all(work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """All results. The first error is raised once all have ended; cancelling cancels all, and waits for them too."""
    done = await asyncio.gather(*work, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return done
