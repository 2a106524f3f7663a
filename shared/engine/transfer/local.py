"""The in-process twin of `nixl.py`: pages move by memmove between the pools of one process.

Transports that share a `hub` can reach each other. It copies one page at a time and lets others run in between, so
that a read can be cancelled, time out and lose its peer midway, as a real one can.
"""

import asyncio
import ctypes
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

from shared.engine.kv.checksum import page_checksums, verify
from shared.engine.kv.layout import Span
from shared.engine.kv.memory import PoolMemory
from shared.engine.transfer.api import Peer, RemotePool, check_page_ids, check_pool, check_verifiable
from shared.engine.transfer.layout_plan import Slices
from shared.errors import DeadlineExceeded, TransferFailed


@dataclass(eq=False)
class LocalPeer:
    """A pool of this process."""

    pool: RemotePool
    slices: Slices | None = None
    is_open: bool = True

    @property
    def spans(self) -> tuple[Span, ...]:
        """What is read of a page."""
        return self.slices.spans if self.slices else (Span(0, 0, self.pool.page_bytes),)


class LocalTransport:
    """Implements `Transport` over memory of this process. A `hub` maps agent names to the living transports."""

    name = "local"

    def __init__(self, memory: PoolMemory, agent_name: str, hub: dict[str, "LocalTransport"]) -> None:
        self.agent_name = agent_name
        self._memory = memory
        self._hub = hub
        self._answering = asyncio.Event()
        self._answering.set()
        self._num_pages_left: int | None = None
        hub[agent_name] = self

    def metadata(self) -> bytes:
        """The agent's name: the hub knows the rest."""
        return self.agent_name.encode()

    def serve(self, seconds: float) -> None:
        """Nothing to do: a memmove needs no help of the owner."""

    @property
    def is_answering(self) -> bool:
        """Whether reads from this pool make progress."""
        return self._answering.is_set()

    def answer(self, answering: bool, num_pages: int | None = None) -> None:
        """Whether reads from this pool make progress, for so many pages if a number is given; False is a peer that was
        stopped.
        """
        self._num_pages_left = num_pages
        if answering:
            self._answering.set()
        else:
            self._answering.clear()

    async def connect(self, pool: RemotePool, timeout_s: float, slices: Slices | None = None) -> LocalPeer:
        """See `Transport.connect`."""
        check_pool(pool, self._memory.page_bytes, slices)
        owner = self._owner(pool)
        if not owner._has(pool):
            raise TransferFailed(f"{pool.agent_name} has registered no such memory")
        await _within(timeout_s, owner._answering.wait())
        return LocalPeer(pool, slices)

    def disconnect(self, peer: Peer) -> None:
        """See `Transport.disconnect`."""
        if isinstance(peer, LocalPeer):
            peer.is_open = False

    async def checksums(self, page_ids: Sequence[int]) -> list[int]:
        """See `Transport.checksums`."""
        return await asyncio.to_thread(page_checksums, self._memory, page_ids)

    async def read(
        self, peer: Peer, remote: Sequence[int], local: Sequence[int], timeout_s: float, checksums: Sequence[int] = ()
    ) -> int:
        """See `Transport.read`. Nothing is staged here: slices are compared where they come from."""
        check_page_ids(peer.pool, remote, self._memory.num_pages, local)
        if not isinstance(peer, LocalPeer):
            raise TransferFailed("the peer belongs to another transport")
        check_verifiable(peer.slices, checksums)
        if peer.slices is not None:
            await verify(self._owner(peer.pool)._memory, remote, checksums)
        await _within(timeout_s, self._copy(peer, remote, local))
        if peer.slices is None:
            await verify(self._memory, local, checksums)
        return len(remote) * sum(span.num_bytes for span in peer.spans)

    def close(self) -> None:
        """See `Transport.close`."""
        if self._hub.get(self.agent_name) is self:
            del self._hub[self.agent_name]

    async def _copy(self, peer: LocalPeer, remote: Sequence[int], local: Sequence[int]) -> None:
        for source, target in zip(remote, local, strict=True):
            if not peer.is_open:
                raise TransferFailed(f"{peer.pool.agent_name} is not connected")
            await self._owner(peer.pool)._page_is_due()
            to = self._memory.address + target * self._memory.page_bytes
            at = peer.pool.base_address + source * peer.pool.page_bytes
            for span in peer.spans:
                ctypes.memmove(to + span.local, at + span.remote, span.num_bytes)
            await asyncio.sleep(0)

    async def _page_is_due(self) -> None:
        await self._answering.wait()
        if self._num_pages_left is not None:
            self._num_pages_left -= 1
            if self._num_pages_left == 0:
                self.answer(False)

    def _has(self, pool: RemotePool) -> bool:
        ours, start = self._memory, pool.base_address
        kind_matches = (pool.memory_kind, pool.device_id) == (ours.kind, ours.device_id)
        end = start + pool.num_pages * pool.page_bytes
        return kind_matches and ours.address <= start and end <= ours.address + ours.num_bytes

    def _owner(self, pool: RemotePool) -> "LocalTransport":
        owner = self._hub.get(pool.agent_name)
        if owner is None or owner.metadata() != pool.agent_metadata:
            raise TransferFailed(f"no agent {pool.agent_name!r} in this process answers to this metadata")
        return owner


async def _within(timeout_s: float, work: Awaitable[object]) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await work
    except TimeoutError:
        raise DeadlineExceeded(f"the peer did not answer within {timeout_s:.3f} s") from None
