"""The in-process twin of `nixl.py`: pages move by memmove between the pools of one process.

Transports that share a `hub` can reach each other. It copies one page at a time and lets others run in between, so
that a read can be cancelled, time out and lose its peer midway, as a real one can.
"""

import asyncio
import ctypes
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass

from shared.engine.kv.memory import PoolMemory
from shared.engine.transfer.api import Peer, RemotePool, check_page_ids
from shared.errors import DeadlineExceeded, Incompatible, TransferFailed


@dataclass(eq=False)
class LocalPeer:
    """A pool of this process."""

    pool: RemotePool
    is_open: bool = True


class LocalTransport:
    """Implements `Transport` over memory of this process. A `hub` maps agent names to the living transports."""

    name = "local"

    def __init__(self, memory: PoolMemory, agent_name: str, hub: dict[str, "LocalTransport"]) -> None:
        self.agent_name = agent_name
        self._memory = memory
        self._hub = hub
        self._answering = asyncio.Event()
        self._answering.set()
        hub[agent_name] = self

    def metadata(self) -> bytes:
        """The agent's name: the hub knows the rest."""
        return self.agent_name.encode()

    def serve(self, seconds: float) -> None:
        """Nothing to do: a memmove needs no help of the owner."""

    def answer(self, answering: bool) -> None:
        """Whether reads from this pool make progress; False is a peer that was stopped."""
        if answering:
            self._answering.set()
        else:
            self._answering.clear()

    async def connect(self, pool: RemotePool, timeout_s: float) -> LocalPeer:
        """See `Transport.connect`."""
        if pool.page_bytes != self._memory.page_bytes:
            raise Incompatible(f"pages of {pool.page_bytes} bytes do not fit pages of {self._memory.page_bytes}")
        owner = self._owner(pool)
        await _within(timeout_s, owner._answering.wait())
        return LocalPeer(pool)

    def disconnect(self, peer: Peer) -> None:
        """See `Transport.disconnect`."""
        if isinstance(peer, LocalPeer):
            peer.is_open = False

    async def read(self, peer: Peer, remote: Sequence[int], local: Sequence[int], timeout_s: float) -> int:
        """See `Transport.read`."""
        check_page_ids(peer.pool, remote, self._memory.num_pages, local)
        await _within(timeout_s, self._copy(peer, remote, local))
        return len(remote) * self._memory.page_bytes

    def close(self) -> None:
        """See `Transport.close`."""
        if self._hub.get(self.agent_name) is self:
            del self._hub[self.agent_name]

    async def _copy(self, peer: Peer, remote: Sequence[int], local: Sequence[int]) -> None:
        size = self._memory.page_bytes
        for source, target in zip(remote, local, strict=True):
            if not peer.is_open:
                raise TransferFailed(f"{peer.pool.agent_name} is not connected")
            await self._owner(peer.pool)._answering.wait()
            ctypes.memmove(self._memory.address + target * size, peer.pool.base_address + source * size, size)
            await asyncio.sleep(0)

    def _owner(self, pool: RemotePool) -> "LocalTransport":
        owner = self._hub.get(pool.agent_name)
        if owner is None or owner.metadata() != pool.agent_metadata:
            raise TransferFailed(f"no agent {pool.agent_name!r} in this process answers to this metadata")
        return owner


async def _within(timeout_s: float, work: Awaitable[object]) -> None:
    try:
        await asyncio.wait_for(work, timeout_s)
    except TimeoutError:
        raise DeadlineExceeded(f"the peer did not answer within {timeout_s:.3f} s") from None
