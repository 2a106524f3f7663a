"""The pool as tensors: where it is on a GPU, and one view per state class."""

from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from math import gcd

import torch

from shared.engine.kv.layout import KvLayout, Span, StateClass
from shared.engine.kv.memory import HostMemory, PoolMemory, Scatter

# Integers by their size: copying moves whole ones.
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class DeviceMemory:
    """Pages in the memory of a GPU, zeroed; satisfies `PoolMemory`. `bytes` is uint8 [num_pages, page_bytes].

    Pages are copied on a stream of its own: the engine's steps, on theirs, hold nothing up and are not held up."""

    kind = "VRAM"

    def __init__(self, num_pages: int, page_bytes: int, device: torch.device) -> None:
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.bytes = torch.zeros(num_pages, page_bytes, dtype=torch.uint8, device=device)
        self.address = self.bytes.data_ptr()
        self.device_id = self.bytes.device.index
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def num_bytes(self) -> int:
        """Size of the whole pool."""
        return self.num_pages * self.page_bytes

    def page(self, page_id: int) -> memoryview:
        """The bytes of one page, copied to the host."""
        copied: memoryview = self.bytes[page_id].cpu().numpy().data
        return copied

    def another(self, num_pages: int, page_bytes: int) -> "DeviceMemory":
        """See `PoolMemory.another`. It is zeroed when this returns: peers may write to it at once."""
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            made = DeviceMemory(num_pages, page_bytes, self.bytes.device)
        self._wait()
        return made

    def scatter(self, pages: "DeviceMemory", spans: Sequence[Span]) -> Scatter:
        """See `PoolMemory.scatter`. All spans at once, word by word: two kernels on a GPU, however many spans."""
        bounds = [(span.remote, span.local, span.num_bytes) for span in spans]
        size = gcd(8, self.page_bytes, pages.page_bytes, *chain(*bounds))
        ours, theirs = self.bytes.view(WORDS[size]), pages.bytes.view(WORDS[size])
        there, here = (
            (torch.cat([torch.arange(b[side], b[side] + b[2], size) for b in bounds]) // size).to(ours.device)
            for side in (0, 1)
        )

        def copy(page_ids: Sequence[int]) -> None:
            with torch.cuda.stream(self._stream) if self._stream else nullcontext():
                rows = torch.tensor(page_ids, device=ours.device)[:, None]
                ours[rows, here] = theirs[: len(rows), there]
            self._wait()

        return copy

    def _wait(self) -> None:
        if self._stream:
            self._stream.synchronize()


def pool_bytes(memory: PoolMemory) -> torch.Tensor:
    """The pool as uint8 [num_pages, page_bytes], sharing its memory."""
    if isinstance(memory, DeviceMemory):
        return memory.bytes
    assert isinstance(memory, HostMemory)
    flat = torch.frombuffer(memory.buffer, dtype=torch.uint8)
    return flat.view(memory.num_pages, memory.page_bytes)


def state_view(pool: torch.Tensor, state: StateClass, shape: tuple[int, ...]) -> torch.Tensor:
    """One state class as [num_pages, *shape]. Strided: pages are `page_bytes` apart.

    Of a form that is no dtype of torch: its bytes, uint8.
    """
    span = pool[:, state.offset_bytes : state.offset_bytes + state.size_bytes]
    typed: torch.Tensor = span.view(getattr(torch, state.dtype, torch.uint8))
    return typed.view(len(pool), *shape)


def state_class(layout: KvLayout, name: str) -> StateClass:
    """The state class called `name`. Raises KeyError."""
    for state in layout.state_classes:
        if state.name == name:
            return state
    raise KeyError(name)
