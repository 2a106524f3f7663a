"""The pool as tensors: one view per state class."""

import torch

from shared.engine.kv.layout import KvLayout, StateClass
from shared.engine.kv.memory import HostMemory


def pool_bytes(memory: HostMemory) -> torch.Tensor:
    """The pool as uint8 [num_pages, page_bytes], sharing its memory."""
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
