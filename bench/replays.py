"""The time of work on a GPU, recorded as a graph: without a host."""

import statistics
from collections.abc import Callable

import torch


def milliseconds(work: Callable[[], object], *, replays: int, repeats: int) -> float:
    """Of one of `replays` of a graph, one behind the other; the median of `repeats`. See `timed`."""
    work()  # compiles what is compiled at first use
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        kept = work()
    times = timed(graph, replays, repeats)
    del kept
    return float(statistics.median(times))


def timed(graph: torch.cuda.CUDAGraph, replays: int, repeats: int) -> list[float]:
    """Milliseconds of one of so many replays behind each other, each time that this is repeated.

    A replay that is not timed goes before each, in which ranks that share the work meet."""
    times = []
    for _ in range(repeats):
        graph.replay()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / replays)
    return times
