"""Causal attention of prompts over pages, by FlashInfer."""

from dataclasses import dataclass

import flashinfer
import torch

from shared.engine.batch import Batch
from shared.engine.pinned import put

WORKSPACE_BYTES = 384 << 20


@dataclass(frozen=True, slots=True)
class PagedShape:
    """What a model's attention is made of; `kernels` is "fa2", "fa3" or "auto"."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype
    kernels: str = "auto"


class PagedAttention:
    """Planned once a step, run once a layer.

    FlashInfer takes most of a millisecond of the host's time to plan. So a step is planned when its first layer
    attends: until then a GPU that has nothing else to do computes what comes before."""

    def __init__(self, shape: PagedShape, device: torch.device) -> None:
        self._shape, self._device, self._planned = shape, device, torch.cuda.Event()
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=shape.kernels)
        self._next: Batch | None = None

    def plan(self, batch: Batch) -> None:
        """The layers of a step follow. `batch` is in host memory."""
        self._next = batch

    def __call__(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """q [T, H, D] -> [T, H, D]. kv [pages, 2, Hkv, page_size, D], one layer's view of the pool."""
        if self._next is not None:
            self._plan(self._next)
            self._next = None
        # Into a tensor of ours: its own it would fill with zeros first.
        out: torch.Tensor = self._wrapper.run(q, kv, out=torch.empty_like(q))
        return out

    def _plan(self, batch: Batch) -> None:
        """Waits until what was planned last is on the device: FlashInfer copies it from one and the same pinned buffer.
        What it would copy from memory that is not pinned, and might have to wait for, is put there before."""
        self._planned.synchronize()
        shape, ids, starts = self._shape, batch.page_ids.tolist(), batch.page_starts.tolist()
        counts = [-(-length // shape.page_size) for length in batch.context_lens.tolist()]
        used = [page for start, count in zip(starts, counts, strict=False) for page in ids[start : start + count]]
        self._wrapper.plan(
            batch.query_starts,
            torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            put(used, torch.int32, self._device),
            (batch.context_lens - 1) % shape.page_size + 1,
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.page_size,
            causal=True,
            q_data_type=shape.dtype,
            kv_data_type=shape.dtype,
        )
        self._planned.record(torch.cuda.current_stream(self._device))
