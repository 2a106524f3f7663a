"""Pages by NIXL READ over UCX: shared memory, CUDA IPC, RDMA or TCP, whichever the two hosts have.

Five facts about NIXL 1.5.1, found by trying (docs/LOG.md), shape this file and its two neighbours:

- An agent makes progress only while it is polled, and is not safe for two threads: `nixl_thread.py` owns them all.
- `transfer()` on a shared-memory path copies inside the call with the GIL released, which also wants a thread.
- An owner must be polled for a peer's first READ (connection set-up), and for every READ over TCP: `serve`.
- Releasing a handle does not stop a READ over TCP, nor does removing the remote agent: the bytes are still written
  when they arrive. Only destroying the reading agent, or never polling it again, stops them. So each peer gets a
  reading agent of its own (25 ms), and a READ that ends in any other way than done takes its agent with it.
- Destroying it at once would be the death of an owner that was merely stopped: when it resumes and answers a GET whose
  connection is gone, UCX aborts the process ("unexpected error: Endpoint timeout"), and so it does where it connects
  back to who is gone. So such an agent is parked, unpolled, until that owner has answered others for a second. Only
  where a NIC can write unpolled is it destroyed at once.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

from shared.engine.kv.checksum import page_checksums, verify
from shared.engine.kv.memory import PoolMemory
from shared.engine.transfer.api import Peer, RemotePool, check_page_ids, check_pool, check_verifiable
from shared.engine.transfer.layout_plan import Slices
from shared.engine.transfer.nixl_link import Link, Read, new_agent
from shared.engine.transfer.nixl_thread import NixlThread
from shared.errors import DeadlineExceeded, Fault, TransferFailed

LINGER_S = 5.0
# What the NIXL thread may be late with an answer to a connect.
LATE_S = 1.0


class NixlTransport:
    """Implements `Transport` with NIXL's UCX backend."""

    name = "nixl"

    def __init__(self, memory: PoolMemory, agent_name: str) -> None:
        self.agent_name = agent_name
        self._memory = memory
        self._num_links = 0
        self._linger_until = 0.0
        self._thread = NixlThread()
        self._thread.start()
        try:
            self._metadata: bytes = self._thread.call(self._open).result()
        except Fault:
            self._thread.close()
            raise

    def metadata(self) -> bytes:
        """See `Transport.metadata`."""
        return self._metadata

    def serve(self, seconds: float) -> None:
        """See `Transport.serve`."""
        now = time.monotonic()
        if seconds > 0:
            self._linger_until = now + LINGER_S
        until_s = max(now + seconds, self._linger_until)
        self._thread.post(partial(self._thread.lookout.serve, until_s, expects=seconds > 0))

    async def connect(self, pool: RemotePool, timeout_s: float, slices: Slices | None = None) -> Link:
        """See `Transport.connect`. Reads the head of the pool once, which also completes UCX's connection."""
        check_pool(pool, self._memory.page_bytes, slices)
        self._num_links += 1
        link = Link(pool, self._memory, f"{self.agent_name}/{self._num_links}", slices)
        ends_at = time.monotonic() + timeout_s + LATE_S
        try:
            await _outcome(self._thread.call(link.open), ends_at=ends_at)
            await self._run(Read(link, link.probe, timeout_s), ends_at)
        except BaseException:
            self.disconnect(link)
            raise
        return link

    def disconnect(self, peer: Peer) -> None:
        """See `Transport.disconnect`."""
        if isinstance(peer, Link):
            self._thread.call(lambda: self._thread.abandon(peer, TransferFailed("disconnected")))

    async def checksums(self, page_ids: Sequence[int]) -> list[int]:
        """See `Transport.checksums`."""
        return await asyncio.to_thread(page_checksums, self._memory, page_ids)

    async def read(
        self, peer: Peer, remote: Sequence[int], local: Sequence[int], timeout_s: float, checksums: Sequence[int] = ()
    ) -> int:
        """See `Transport.read`."""
        check_page_ids(peer.pool, remote, self._memory.num_pages, local)
        if not isinstance(peer, Link):
            raise TransferFailed("the peer belongs to another transport")
        check_verifiable(peer.slices, checksums)
        if remote and peer.num_staged:
            await self._read_staged(peer, remote, local, timeout_s, checksums)
        elif remote:
            await self._run(Read(peer, lambda: peer.request(remote, local), timeout_s))
            await verify(self._memory, local, checksums)
        wanted = None if peer.slices is None or peer.num_staged else peer.slices.num_bytes
        return len(remote) * (wanted or peer.pool.page_bytes)

    async def _read_staged(
        self, link: Link, remote: Sequence[int], local: Sequence[int], timeout_s: float, checksums: Sequence[int]
    ) -> None:
        """Whole pages into the link's buffer, as many as fit at a time, and from there into place if they are right."""
        ends_at = time.monotonic() + timeout_s
        async with link.staging:
            for at in range(0, len(remote), link.num_staged):
                theirs, ours = remote[at : at + link.num_staged], local[at : at + link.num_staged]
                left_s = ends_at - time.monotonic()
                await self._run(Read(link, partial(link.request, theirs, range(len(theirs))), left_s))
                await verify(link.memory, range(len(theirs)), checksums[at : at + link.num_staged])
                await _outcome(self._thread.call(partial(link.scatter, ours)))

    def close(self) -> None:
        """See `Transport.close`."""
        self._thread.close()

    def _open(self) -> bytes:
        self._thread.server = new_agent(self.agent_name, self._memory)
        return bytes(self._thread.server.get_agent_metadata())

    async def _run(self, read: Read, ends_at: float = math.inf) -> None:
        self._thread.post(partial(self._thread.begin, read))
        await _outcome(read.done, read.hurry, ends_at)


async def _outcome(future: Future[Any], on_cancel: Callable[[], None] = lambda: None, ends_at: float = math.inf) -> Any:
    """The future's outcome; if cancelled, wait for it all the same and then be cancelled.

    Past `ends_at`, of time.monotonic, nothing is waited for: raises DeadlineExceeded. Only what writes to our pages has
    no such end, for they are free when this returns.
    """
    waiter = asyncio.wrap_future(future)
    waiter.add_done_callback(_take_note)
    try:
        await _end(waiter, ends_at)
    except asyncio.CancelledError:
        on_cancel()
        while not waiter.done() and time.monotonic() < ends_at:
            with contextlib.suppress(asyncio.CancelledError):
                await _end(waiter, ends_at)
        raise
    if not waiter.done():
        raise DeadlineExceeded("NIXL did not answer at all")
    return waiter.result()


async def _end(waiter: asyncio.Future[Any], ends_at: float) -> None:
    left_s = None if ends_at == math.inf else max(0.0, ends_at - time.monotonic())
    await asyncio.wait([waiter], timeout=left_s)


def _take_note(waiter: asyncio.Future[Any]) -> None:
    """An error that nobody waits for any more is no news for the log."""
    if not waiter.cancelled():
        waiter.exception()
