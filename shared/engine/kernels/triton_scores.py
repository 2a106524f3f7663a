"""Index scores (DSA) of many rows of one sequence, in Triton: a tile of keys times all heads of several rows.

The twin is `sparse_reference.select`; `triton_index` scores rows of any sequences one by one.
"""

import torch
import triton
import triton.language as tl

from shared.engine.kernels.inputs import Rows

ROWS, KEYS, WARPS, STAGES = 4, 64, 8, 2  # the fastest (docs/LOG.md)
PROGRAMS = 264


@triton.jit(do_not_specialize=["num_rows", "capacity"])
def _scores(
    q, weights, keys, positions, starts, page_ids, scores, weight_stride, page_stride, num_rows, capacity, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    begin = tl.program_id(0) * ROWS
    column, d = tl.arange(0, ROWS * HEADS), tl.arange(0, DIM)
    row, head = tl.minimum(begin + column // HEADS, num_rows - 1).to(tl.int64), column % HEADS
    queries = tl.load(q + (row * HEADS + head)[None, :] * DIM + d[:, None])
    weight = tl.load(weights + row * weight_stride + head).to(tl.float32) * scale
    r = begin + tl.arange(0, ROWS)
    position = tl.load(positions + r, r < num_rows, -1)
    most = tl.load(positions + tl.minimum(begin + ROWS, num_rows) - 1)
    table = page_ids + tl.load(starts + begin)
    target = scores + r.to(tl.int64)[None, :] * capacity
    for start in range(tl.program_id(1) * KEYS, most + 1, tl.num_programs(1) * KEYS):
        at = start + tl.arange(0, KEYS)
        inside = at <= most
        page = tl.load(table + at // PAGE_SIZE, inside, 0).to(tl.int64)
        token = keys + page * page_stride + (at % PAGE_SIZE) * DIM
        key = tl.load(token[:, None] + d[None, :], inside[:, None], 0.0)
        found = tl.maximum(tl.dot(key, queries), 0.0) * weight[None, :]
        score = tl.sum(tl.reshape(found, [KEYS, ROWS, HEADS]), 2)
        tl.store(target + at[:, None], score, at[:, None] <= position[None, :])


def scores(
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    rows: Rows,
    out: torch.Tensor,
    *,
    together: int = ROWS,
    at_once: int = KEYS,
    warps: int = WARPS,
    stages: int = STAGES,
) -> None:
    """Write into `out` float32 [T, capacity] the score of each token that a row sees, of rows of one sequence that
    follow each other. As in `triton_index.select`: q [T, H, D]; weights [T, H], rows may be strided; keys [pages,
    page_size, D]."""
    num_rows, heads, dim = q.shape
    num_blocks = triton.cdiv(num_rows, together)
    num_parts = min(triton.cdiv(out.shape[1], at_once), triton.cdiv(PROGRAMS, num_blocks))
    _scores[(num_blocks, num_parts)](
        q, weights, keys, rows.positions, rows.starts, rows.page_ids, out, weights.stride(0), keys.stride(0), num_rows,
        out.shape[1], (heads * dim) ** -0.5, heads, dim, keys.shape[1], together, at_once,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
