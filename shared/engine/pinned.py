"""To a device and back without waiting for it. Copies go by pinned memory, which torch's allocator of such memory does
not give out again before they are done.
"""

from collections.abc import Sequence
from typing import Any

import torch


def put(values: Sequence[Any] | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers, or a tensor in host memory or there already, on a device; a GPU gets them as they are now."""
    here = torch.as_tensor(values, dtype=dtype)
    return here if device.type == "cpu" or here.is_cuda else here.pin_memory().to(device, non_blocking=True)


def some(values: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
    """`values` [N, ..] at `places`; themselves if these are all of them in order."""
    return values if list(places) == list(range(len(values))) else values[put(places, torch.int64, values.device)]


class Fetched:
    """A tensor on its way from a device to host memory, behind everything that was launched before."""

    def __init__(self, values: torch.Tensor) -> None:
        self._host, self._done = values, None
        if values.is_cuda:
            self._host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(values.device))

    def is_done(self) -> bool:
        """Whether `wait` returns at once."""
        return self._done is None or self._done.query()

    def wait(self) -> torch.Tensor:
        """The tensor in host memory, once it and what was launched before it is computed."""
        if self._done is not None:
            self._done.synchronize()
        return self._host
