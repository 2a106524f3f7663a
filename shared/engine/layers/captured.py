"""Steps as CUDA graphs: launched once, replayed with other numbers in the same places."""

from collections.abc import Callable
from typing import TypeVar

import torch

Found = TypeVar("Found")


def record(compute: Callable[[], Found], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Found]:
    """The graph of what `compute` launches, and what it returns: tensors that each replay fills anew.

    It runs once before, which compiles what is compiled at first use. Other threads may move pages meanwhile.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        compute()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = compute()
    return graph, found
