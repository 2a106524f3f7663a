"""The pool as tensors: where it is on a GPU, and one view per state class."""

import torch

from shared.engine.kv.layout import KvLayout, StateClass
from shared.engine.kv.memory import HostMemory, PoolMemory


class DeviceMemory:
    """Pages in the memory of a GPU, zeroed; satisfies `PoolMemory`. `bytes` is uint8 [num_pages, page_bytes]."""

    kind = "VRAM"

    def __init__(self, num_pages: int, page_bytes: int, device: torch.device) -> None:
        self.num_pages = num_pages
        self.page_bytes = page_bytes
        self.bytes = torch.zeros(num_pages, page_bytes, dtype=torch.uint8, device=device)
        self.address = self.bytes.data_ptr()
        self.device_id = self.bytes.device.index

    @property
    def num_bytes(self) -> int:
        """Size of the whole pool."""
        return self.num_pages * self.page_bytes

    def page(self, page_id: int) -> memoryview:
        """The bytes of one page, copied to the host."""
        copied: memoryview = self.bytes[page_id].cpu().numpy().data
        return copied


def pool_bytes(memory: PoolMemory) -> torch.Tensor:
    """The pool as uint8 [num_pages, page_bytes], sharing its memory."""
    if isinstance(memory, DeviceMemory):
        return memory.bytes
    assert isinstance(memory, HostMemory)
    flat = torch.frombuffer(memory.buffer, dtype=torch.uint8)
    return flat.view(memory.num_pages, memory.page_bytes)


def state_view(pool: torch.Tensor, state: StateClass, shape: tuple[int, ...]) -> torch.Tensor:
    """One state class as [num_pages, *shape]; `shape` begins with the layers. Strided: pages are `page_bytes` apart.

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
