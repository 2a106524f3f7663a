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
from shared.errors import Incompatible


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
    """Our rank `rank` reads from a peer's rank over this."""

    rank: int
    peer: Peer


@dataclass(frozen=True, slots=True)
class PeerPools:
    """A connected worker. `whole` if its one rank's pages are taken as they are."""

    links: tuple[Link, ...]
    whole: bool

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

    async def connect(self, theirs: Sequence[RankPool], timeout_s: float) -> PeerPools:
        """Connect each rank of ours to those of a peer that it has something to take from. As `Transport.connect`."""
        if not theirs or len({pool.pool.num_pages for pool in theirs}) > 1:
            raise Incompatible("the peer's ranks have pools of different sizes, or there are none")
        takes = [(rank, take) for rank in range(len(self._members)) for take in self._plan(rank, theirs)]
        links: list[Link] = []
        try:
            await _all([self._connect(rank, take, theirs, timeout_s, links) for rank, take in takes])
        except BaseException:
            self.disconnect(PeerPools(tuple(links), whole=False))
            raise
        whole = len(self._members) == len(theirs) == 1 and takes[0][1].slices is None
        return PeerPools(tuple(links), whole)

    def _plan(self, rank: int, theirs: Sequence[RankPool]) -> tuple[Take, ...]:
        own = self._members[rank].own
        reader = Reader(rank, len(self._members), self._salt, can_stage=own.pool.memory_kind == "DRAM")
        return plan(own.layout, [pool.layout for pool in theirs], reader)

    async def _connect(
        self, rank: int, take: Take, theirs: Sequence[RankPool], timeout_s: float, links: list[Link]
    ) -> None:
        transport = self._members[rank].transport
        links.append(Link(rank, await transport.connect(theirs[take.rank].pool, timeout_s, take.slices)))

    def disconnect(self, peer: PeerPools) -> None:
        """See `Transport.disconnect`."""
        for link in peer.links:
            self._members[link.rank].transport.disconnect(link.peer)

    async def read(self, peer: PeerPools, remote: Sequence[int], local: Sequence[int], timeout_s: float) -> int:
        """As `Transport.read`, in every rank; returns only when nothing is written in any of them any more."""
        transports = [self._members[link.rank].transport for link in peer.links]
        reads = [
            transport.read(link.peer, remote, local, timeout_s)
            for transport, link in zip(transports, peer.links, strict=True)
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
