"""How fast a GPU reads its memory when nothing is in the way."""

import torch

REPEATS = 10


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second of a plain sum over 4 GiB, the best of ten."""
    data = torch.ones(1 << 30, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        data.sum()
        end.record()
        torch.cuda.synchronize(device)
        best = min(best, begin.elapsed_time(end) / 1e3)
    return data.nbytes / best
