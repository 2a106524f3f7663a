"""Steps as CUDA graphs: launched once, replayed with other numbers in the same places.

Graphs of one recorder share the memory of what they compute on the way, and of what they leave: torch gives to the next
graph what the last one let go of while it was recorded. That is safe because they are replayed one after the other on
one stream, and because whatever a replay leaves is read by work that is launched before the next replay, of whichever
graph. What has to last longer than that (inputs, counters, weights) is allocated before, and kept.
"""

from collections.abc import Callable
from typing import TypeVar

import torch

Found = TypeVar("Found")


class Recorder:
    """Records the graphs of one decoder. The largest recorded first take the least memory together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: object = None

    def record(self, compute: Callable[[], Found]) -> tuple[torch.cuda.CUDAGraph, Found]:
        """The graph of what `compute` launches, and what it returns: tensors that each replay fills anew. They keep
        their memory from later graphs as long as somebody has them, so keep what is `lent` instead.

        It runs once before, which compiles what is compiled at first use. Other threads may move pages meanwhile.
        """
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(self._device), torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            compute()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):  # type: ignore[arg-type]
            found = compute()
        return graph, found


class _Place:
    """Where a tensor is, in the terms of CUDA's array interface, by which libraries hand each other memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (tensor.nbytes,), "typestr": "|u1", "data": (tensor.data_ptr(), False), "version": 3,
        }  # fmt: skip


def lent(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor, which is contiguous, without a hold on its memory: what a graph fills, and others may fill too.
    The graph keeps the memory itself from being given back."""
    if not tensor.is_cuda or not tensor.nbytes:
        return tensor
    assert tensor.is_contiguous()
    return torch.as_tensor(_Place(tensor), device=tensor.device).view(tensor.dtype).view(tensor.shape)
