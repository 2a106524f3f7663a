"""A group of ranks over torch.distributed: gloo between processors, NCCL between GPUs.

Process groups are made and held here; torch's global one is not touched, so that a process may be in several.
"""

from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupGloo, Store, TCPStore  # type: ignore[attr-defined]

from shared.engine.parallel.group import ordered_sum

HOST = "127.0.0.1"


class DistributedGroup:
    """Satisfies `Group`. Tensors in host memory go by gloo, those of a GPU by NCCL, whose group the first one makes.

    A collective of gloo that takes longer than `timeout_s` raises RuntimeError; one of NCCL ends the process.
    """

    def __init__(self, store: Store, rank: int, num_ranks: int, timeout_s: float) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._store, self._timeout = store, timedelta(seconds=timeout_s)
        self._gloo: Any = self._make_gloo()
        self._nccl: Any = None

    def _make_gloo(self) -> Any:
        options: Any = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [ProcessGroupGloo.create_device(hostname=HOST)]
        options._timeout = self._timeout
        return ProcessGroupGloo(PrefixStore("gloo", self._store), self.rank, self.num_ranks, options)

    def _make_nccl(self) -> Any:
        from torch.distributed import ProcessGroupNCCL  # absent from builds of torch without CUDA

        options: Any = ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        return ProcessGroupNCCL(PrefixStore("nccl", self._store), self.rank, self.num_ranks, options)

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """See `Group.sum`. Gathered and added in rank order: a ring would add in an order that depends on the shape."""
        return ordered_sum(self._gather(part))

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """See `Group.join`."""
        return torch.cat(self._gather(part), dim=-1)

    def _gather(self, part: torch.Tensor) -> list[torch.Tensor]:
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.num_ranks)]
        if part.is_cuda and self._nccl is None:
            self._nccl = self._make_nccl()
        (self._nccl if part.is_cuda else self._gloo).allgather([parts], [part]).wait()
        return parts


def host_store(timeout_s: float) -> TCPStore:
    """The place where ranks of this host find each other, kept by rank 0; its port is for `join_store`."""
    return TCPStore(HOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))


def join_store(port: int, timeout_s: float) -> TCPStore:
    """The store of rank 0."""
    return TCPStore(HOST, port, is_master=False, timeout=timedelta(seconds=timeout_s))
