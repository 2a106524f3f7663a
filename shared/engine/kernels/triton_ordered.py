"""Parts of a sum added up in their order, in Triton, to the bit as by its twin, `parallel.group.ordered_sum`."""

import torch
import triton
import triton.language as tl

BLOCK = 2048


@triton.jit(do_not_specialize=["size"])
def _ordered_sum(parts, out, size, NUM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(parts + at, inside, 0.0).to(tl.float32)
    for part in tl.static_range(1, NUM):
        total += tl.load(parts + part * size + at, inside, 0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


def ordered_sum(parts: torch.Tensor) -> torch.Tensor:
    """parts [ranks, N], contiguous; added in float32, in their dtype [N]."""
    num, size = parts.shape
    out = parts.new_empty(size)
    _ordered_sum[(triton.cdiv(size, BLOCK),)](parts, out, size, num, BLOCK, num_warps=4)
    return out
