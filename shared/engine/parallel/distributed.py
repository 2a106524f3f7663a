"""A group of ranks over torch.distributed: gloo between processors, NCCL between GPUs.

Process groups are made and held here; torch's global one is not touched, so that a process may be in several. What few
tokens need on GPUs goes by kernels of our own through the memory of the others (`kernels.triton_peers`) where the
hardware has that; by NCCL it takes several times as long (docs/LOG.md).
"""

import ctypes
import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]

from shared.engine.parallel import peer_memory
from shared.engine.parallel.group import added, ordered_sum
from shared.errors import Unsupported

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
LEAST_SHARED_OUT = 1 << 20  # bytes of a part that ranks share out to add it up
# NCCL's watchdog aborts the process, whose clients would never hear why. Who waits for ranks gives up before, with a
# fault (`parallel.executor`), and ranks end with their worker.
NO_TIMEOUT = timedelta(days=1)


class DistributedGroup:
    """Satisfies `Group`. Tensors in host memory go by gloo. Those of a GPU, which is the current one of the thread that
    comes first with one, go by NCCL and, with `peers`, through the memory of the other GPUs; both can be captured.

    A collective of gloo that takes longer than `timeout_s` raises RuntimeError; one on GPUs keeps them busy.
    """

    def __init__(self, store: Store, rank: int, num_ranks: int, timeout_s: float, *, peers: bool = True) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._store, self._timeout, self._wants_peers = store, timedelta(seconds=timeout_s), peers
        self._gloo: Any = self._make_gloo()
        self._nccl: Any = None
        self._sums: Any = None
        self._joins: Any = None

    def _make_gloo(self) -> Any:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=HOST)]
        options._timeout = self._timeout
        return ProcessGroupGloo(PrefixStore("gloo", self._store), self.rank, self.num_ranks, options)

    @property
    def by_peers(self) -> bool:
        """Whether ranks have met on GPUs, and what there is room for goes through their memory."""
        return self._sums is not None

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """See `Group.sum`."""
        part = part.contiguous()
        if exchange := self._through(lambda: self._sums, part):
            summed: torch.Tensor = exchange.sum(part)
            return summed
        return self._added_up(part)

    def add(self, part: torch.Tensor, stream: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Group.add`."""
        part = part.contiguous()
        if exchange := self._through(lambda: self._sums, part):
            begun: tuple[torch.Tensor, torch.Tensor] = exchange.add(part, stream, gain)
            return begun
        return added(self._added_up(part), stream, gain)

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """See `Group.join`."""
        part = part.contiguous()
        if exchange := self._through(lambda: self._joins, part):
            joined: torch.Tensor = exchange.join(part)
            return joined
        return torch.cat(self._gather(part).unbind(), dim=-1)

    def _added_up(self, part: torch.Tensor) -> torch.Tensor:
        """In rank order: a ring would add in an order that depends on the shape. Of a large part each rank adds up a
        share for all, of a small one all of it for itself."""
        if not part.is_cuda or part.nbytes < LEAST_SHARED_OUT or part.numel() % self.num_ranks:
            return ordered_sum(self._gather(part).unbind())
        from shared.engine.kernels import triton_ordered

        return shared_out(self._nccl, part, self.num_ranks, triton_ordered.ordered_sum)

    def _gather(self, part: torch.Tensor) -> torch.Tensor:
        """[ranks, ...]."""
        parts = part.new_empty((self.num_ranks, *part.shape))
        if part.is_cuda:
            self._meet(part)
            self._nccl._allgather_base(parts, part).wait()
        else:
            self._gloo.allgather([list(parts.unbind())], [part]).wait()
        return parts

    def _through(self, exchange: Callable[[], Any], part: torch.Tensor) -> Any:
        """The way through the memory of the other GPUs that there is once ranks have met, if it takes the part."""
        if not part.is_cuda:
            return None
        self._meet(part)
        made = exchange()
        return made if made is not None and made.takes(part) else None

    def _meet(self, part: torch.Tensor) -> None:
        """Make what GPUs need, once: NCCL's group, whose first collective must not be captured, and shared memory."""
        if self._nccl is not None:
            return
        from torch.distributed import ProcessGroupNCCL  # absent from builds of torch without CUDA

        options: Any = ProcessGroupNCCL.Options()
        options._timeout = NO_TIMEOUT
        self._nccl = _kept(ProcessGroupNCCL(PrefixStore("nccl", self._store), self.rank, self.num_ranks, options))
        self._nccl._allgather_base(part.new_empty(self.num_ranks), part.new_empty(1)).wait()
        if self._wants_peers and self.num_ranks > 1:
            try:
                self._sums, self._joins = self._exchanges()
            except (ImportError, Unsupported) as reason:
                log.warning("ranks add up by NCCL alone, which is slower: %s", reason)

    def _exchanges(self) -> list[Any]:
        """For sums and for joins, in memory of their own: each turns by its own calls."""
        from shared.engine.kernels import triton_peers

        kinds = (triton_peers.SUM_BYTES, triton_peers.MOST_SUMMED), (triton_peers.JOIN_BYTES, triton_peers.MOST_JOINED)
        sizes = [triton_peers.buffer_bytes(most, self.num_ranks) for _, most in kinds]
        store, memory = PrefixStore("memory", self._store), peer_memory.CudaMemory()
        at, made = peer_memory.share(sum(sizes), memory, store, self.rank, self.num_ranks), []
        for (piece, most), size in zip(kinds, sizes, strict=True):
            made.append(triton_peers.Exchange(at, self.rank, piece, most, torch.device("cuda", memory.device)))
            at = [address + size for address in at]
        return made


def shared_out(
    group: Any, part: torch.Tensor, num_ranks: int, add_up: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The sum of every rank's part, contiguous, of which each rank adds up a share, [ranks, N] to [N], for all."""
    shares = part.new_empty(num_ranks, part.numel() // num_ranks)
    group.alltoall_base(shares, part.view_as(shares), [], []).wait()
    out = torch.empty_like(part)
    group._allgather_base(out.view(-1), add_up(shares)).wait()
    return out


def _kept(group: Any) -> Any:
    """The same, for as long as the process lives: the good-bye of a group of NCCL waits for every graph that it is part
    of, and for a peer that may have ended."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
    return group


def host_store(timeout_s: float) -> TCPStore:
    """The place where ranks of this host find each other, kept by rank 0; its port is for `join_store`."""
    return TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_store(port: int, timeout_s: float) -> TCPStore:
    """The store of rank 0."""
    return TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=timeout_s))
