"""One connection of NIXL: a reading agent and the one pool that it reads. Only the NIXL thread calls what is here."""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.engine.kv.layout import Span
from shared.engine.kv.memory import HostMemory, PoolMemory, Scatter
from shared.engine.transfer.api import RemotePool
from shared.engine.transfer.layout_plan import Slices
from shared.errors import TransferFailed

CANCEL_GRACE_S = 0.2
PROBE_BYTES = 64
STAGING_BYTES = 16 << 20
ENVIRONMENT = {
    # Without it READ between two GPUs of a host is emulated over TCP, 2,000 times slower.
    "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "y",
    # Hosts without CUDA do not know that variable.
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    # Faults, and an agent destroyed with a READ in flight, are reported by us.
    "UCX_LOG_LEVEL": "error",
    "NIXL_LOG_LEVEL": "FATAL",
}


def new_agent(name: str, memory: PoolMemory) -> Any:
    """A NIXL agent with a pool registered and no thread of its own. Sets the environment that UCX is to see."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    import nixl_cu13._api as nixl

    agent = nixl.nixl_agent(name, nixl.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    agent.register_memory([_region(memory)], memory.kind)
    return agent


class Link:
    """A peer's pool and the agent that reads it: open, then perhaps parked, then closed.

    Staged slices are read as whole pages into a buffer of `num_staged` pages, and `scatter` copies them from the first
    of those to our pages of the ids that it is given.
    `memory` is what it reads into: that buffer, or our pool.
    """

    def __init__(self, pool: RemotePool, memory: PoolMemory, agent_name: str, slices: Slices | None = None) -> None:
        self.pool, self.slices = pool, slices
        self.parked = False
        self.answered_s = 0.0  # once parked: when its owner first answered another link again
        self.num_staged = max(1, STAGING_BYTES // pool.page_bytes) if slices and slices.staged else 0
        self.staging = asyncio.Lock()  # the buffer has one user at a time
        self.memory = memory
        self.scatter: Scatter = _nowhere
        if slices and slices.staged:
            self.memory = memory.another(self.num_staged, pool.page_bytes)
            self.scatter = memory.scatter(self.memory, slices.spans)
        whole = (Span(0, 0, pool.page_bytes),)
        self._spans = slices.spans if slices and not slices.staged else whole
        self._agent_name = agent_name
        self._scratch = HostMemory(1, PROBE_BYTES)
        self._agent: Any = None
        self._handles: list[Any] = []

    def open(self) -> None:
        """Make the agent and prepare a descriptor for each span of each page of both pools. Raises TransferFailed."""
        agent = self._agent = new_agent(self._agent_name, self.memory)
        agent.register_memory([_region(self._scratch)], self._scratch.kind)
        found = agent.add_remote_agent(self.pool.agent_metadata)
        if (found.decode() if isinstance(found, bytes) else found) != self.pool.agent_name:
            raise TransferFailed(f"the metadata of {self.pool.agent_name} are of another agent")
        ours, theirs = self.memory, self.pool
        starts = [span.local for span in self._spans], [span.remote for span in self._spans]
        sizes = [span.num_bytes for span in self._spans]
        local = _descriptors(ours.address, ours.num_pages, ours.page_bytes, ours.device_id, starts[0], sizes)
        remote = _descriptors(
            theirs.base_address, theirs.num_pages, theirs.page_bytes, theirs.device_id, starts[1], sizes
        )
        self._handles.append(agent.prep_xfer_dlist("NIXL_INIT_AGENT", local, ours.kind))
        self._handles.append(agent.prep_xfer_dlist(theirs.agent_name, remote, theirs.memory_kind))

    @property
    def is_open(self) -> bool:
        """See `Peer.is_open`. May be asked from any thread."""
        return self._agent is not None and not self.parked

    @property
    def agent(self) -> Any:
        """The agent, for posting and polling. Raises TransferFailed unless the link is open."""
        if self._agent is None or self.parked:
            raise TransferFailed(f"the connection to {self.pool.agent_name} was closed")
        return self._agent

    def request(self, remote: Sequence[int], local: Sequence[int]) -> Any:
        """A READ, not yet posted. NIXL itself merges descriptors that are adjacent on both sides."""
        agent, count = self.agent, len(self._spans)
        spans = np.arange(count, dtype=np.int32)
        ours, theirs = ((np.asarray(ids, np.int32)[:, None] * count + spans).ravel() for ids in (local, remote))
        return agent.make_prepped_xfer("READ", self._handles[0], ours, self._handles[1], theirs, b"")

    def probe(self) -> Any:
        """A READ of the first bytes of the peer's pool into scratch memory, not yet posted."""
        agent, pool = self.agent, self.pool
        size = min(PROBE_BYTES, pool.page_bytes)
        local = agent.get_xfer_descs([(self._scratch.address, size, 0)], self._scratch.kind)
        remote = agent.get_xfer_descs([(pool.base_address, size, pool.device_id)], pool.memory_kind)
        return agent.initialize_xfer("READ", local, remote, pool.agent_name)

    def park(self, unfinished: Sequence[Any]) -> None:
        """Poll no more, which stops every write that is not a NIC's, but keep the connection up."""
        self.parked = True
        self._handles.extend(unfinished)

    def close(self) -> None:
        """Destroy the agent, and with it every READ in flight."""
        for handle in reversed(self._handles):
            handle.release()
        self._handles.clear()
        self._agent = None


class Read:
    """One READ: `make` builds the request, `done` gets its outcome."""

    def __init__(self, link: Link, make: Callable[[], Any], timeout_s: float) -> None:
        self.link = link
        self.make = make
        self.timeout_s = timeout_s
        self.ends_at = time.monotonic() + timeout_s
        self.request: Any = None
        self.done: Future[None] = Future()

    def hurry(self) -> None:
        """Nobody wants it any more: give it a moment to end cleanly, because its link is lost if it does not."""
        self.ends_at = min(self.ends_at, time.monotonic() + CANCEL_GRACE_S)


def _nowhere(_: Sequence[int]) -> None:
    """Where nothing is staged, nothing is copied."""


def _region(memory: PoolMemory) -> tuple[int, int, int, str]:
    return (memory.address, memory.num_bytes, memory.device_id, "")


def _descriptors(
    address: int, num_pages: int, page_bytes: int, device_id: int, starts: Sequence[int], sizes: Sequence[int]
) -> npt.NDArray[np.uint64]:
    """[num_pages * spans, 3]: address, length, device."""
    found = np.empty((num_pages, len(starts), 3), dtype=np.uint64)
    pages = np.uint64(address) + np.arange(num_pages, dtype=np.uint64) * np.uint64(page_bytes)
    found[..., 0] = pages[:, None] + np.asarray(starts, np.uint64)
    found[..., 1], found[..., 2] = np.asarray(sizes, np.uint64), device_id
    return found.reshape(-1, 3)
