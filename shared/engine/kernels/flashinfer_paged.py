"""Causal attention of prompts over pages, by FlashInfer.

Where all of a step's sequences begin in it, their keys and values need not be looked up: they are among the rows that
the step has multiplied. FA3 copies those in whole tiles, and takes a sixth less time (docs/LOG.md).
"""

from dataclasses import dataclass
from typing import Any

import flashinfer
import torch

from shared.engine.batch import Batch
from shared.engine.pinned import put

WORKSPACE_BYTES = 384 << 20
FA3_CAPABILITY = 9  # and no later one


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
        self._over_pages = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=shape.kernels)
        self._over_rows: Any | None = None
        if shape.kernels != "fa2" and torch.cuda.get_device_capability(device)[0] == FA3_CAPABILITY:
            # One workspace is enough for both: no step uses more than one of them.
            self._over_rows = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend="fa3")
        self._next: Batch | None = None
        self._by_rows = False

    def plan(self, batch: Batch) -> bool:
        """The layers of a step follow. `batch` is in host memory. Whether they attend over the step's own rows."""
        self._next = batch
        self._by_rows = self._over_rows is not None and torch.equal(batch.query_starts.diff(), batch.context_lens)
        return self._by_rows

    def __call__(self, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        """q [T, H, D] -> [T, H, D]. kv [pages, 2, Hkv, page_size, D], one layer's view of the pool. Over the step's own
        rows q is [T, H + 2 Hkv, D], with keys and values behind the queries."""
        if self._next is not None:
            self._plan(self._next)
            self._next = None
        # Into a tensor of ours: its own it would fill with zeros first.
        num_heads, num_kv_heads = self._shape.num_heads, self._shape.num_kv_heads
        out = q.new_empty(len(q), num_heads, self._shape.head_dim)
        if self._by_rows and self._over_rows is not None:
            self._over_rows.run(*q.split((num_heads, num_kv_heads, num_kv_heads), dim=1), out=out)
        else:
            self._over_pages.run(q, kv, out=out)
        return out

    def _plan(self, batch: Batch) -> None:
        """Waits until what was planned last is on the device: FlashInfer copies it from one and the same pinned buffer.
        What it would copy from memory that is not pinned, and might have to wait for, is put there before."""
        self._planned.synchronize()
        shape = self._shape
        heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
        kinds = {"causal": True, "q_data_type": shape.dtype, "kv_data_type": shape.dtype}
        if self._by_rows and self._over_rows is not None:
            self._over_rows.plan(batch.query_starts, batch.query_starts, *heads, **kinds)
        else:
            ids, starts = batch.page_ids.tolist(), batch.page_starts.tolist()
            counts = [-(-length // shape.page_size) for length in batch.context_lens.tolist()]
            used = [page for start, count in zip(starts, counts, strict=False) for page in ids[start : start + count]]
            self._over_pages.plan(
                batch.query_starts,
                torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
                put(used, torch.int32, self._device),
                (batch.context_lens - 1) % shape.page_size + 1,
                *heads,
                shape.page_size,
                **kinds,
            )
        self._planned.record(torch.cuda.current_stream(self._device))
