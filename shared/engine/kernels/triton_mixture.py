"""The rows of chosen experts weighted and added up where their tokens are, in Triton. The twin is the sum in
`layers.moe.Moe`."""

import torch
import triton
import triton.language as tl

COLUMNS = 1024  # of a token, that a program adds up


@triton.jit
def _add_up(parts, places, weights, own, out, hidden, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    total = tl.load(own + row * hidden + column, inside, 0.0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        place = tl.load(places + row * TOP_K + choice)
        weight = tl.load(weights + row * TOP_K + choice)
        total += weight * tl.load(parts + place * hidden + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * hidden + column, total.to(out.dtype.element_ty), inside)


def add_up(parts: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """own [T, hidden] plus what was chosen: rows `places` int64 [T, top_k] of parts [.., hidden], times `weights`
    float32 [T, top_k]; in float32, rounded to the dtype of `own`."""
    (num_rows, top_k), hidden = places.shape, own.shape[1]
    out = torch.empty_like(own)
    _add_up[(num_rows, triton.cdiv(hidden, COLUMNS))](
        parts, places, weights, own, out, hidden, top_k, COLUMNS, num_warps=4
    )
    return out
