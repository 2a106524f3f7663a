"""The memory behind a page pool: allocated once, registered once, never freed while the process lives.

A peer's READ can arrive at any time, and deregistering does not stop it; so the pool outlives every lease by design.
"""

import ctypes
import mmap
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from shared.engine.kv.layout import Span

Scatter = Callable[[Sequence[int]], None]


class PoolMemory(Protocol):
    """Where pages are. `page(i)` starts at `address + i * page_bytes`."""

    address: int
    num_pages: int
    page_bytes: int
    kind: str
    device_id: int

    @property
    def num_bytes(self) -> int:
        """Size of the whole pool."""

    def page(self, page_id: int) -> memoryview:
        """The bytes of one page in host memory: the page itself, or a copy of it if it is on a device."""

    def another(self, num_pages: int, page_bytes: int) -> Self:
        """A pool of the same kind in the same place."""

    def scatter(self, pages: Self, spans: Sequence[Span]) -> Scatter:
        """A way to copy these spans of the first pages of `pages`, which `another` made, into pages of ours: made once,
        and called by one thread at a time with their ids. It returns when they are there."""


class HostMemory:
    """Pages in anonymous host memory, zeroed and committed lazily by the kernel."""

    kind = "DRAM"
    device_id = 0

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.buffer = mmap.mmap(-1, num_pages * page_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))

    @property
    def num_bytes(self) -> int:
        """Size of the whole pool."""
        return self.num_pages * self.page_bytes

    def page(self, page_id: int) -> memoryview:
        """The bytes of one page, writable."""
        start = page_id * self.page_bytes
        return memoryview(self.buffer)[start : start + self.page_bytes]

    def another(self, num_pages: int, page_bytes: int) -> "HostMemory":
        """See `PoolMemory.another`."""
        return HostMemory(num_pages, page_bytes)

    def scatter(self, pages: "HostMemory", spans: Sequence[Span]) -> Scatter:
        """See `PoolMemory.scatter`."""
        ours, theirs = self._bytes(), pages._bytes()

        def copy(page_ids: Sequence[int]) -> None:
            ids = list(page_ids)
            for span in spans:
                there, here = span.remote + span.num_bytes, span.local + span.num_bytes
                ours[ids, span.local : here] = theirs[: len(ids), span.remote : there]

        return copy

    def _bytes(self) -> npt.NDArray[np.uint8]:
        return np.frombuffer(self.buffer, np.uint8).reshape(self.num_pages, self.page_bytes)
