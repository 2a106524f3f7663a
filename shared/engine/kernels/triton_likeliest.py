"""The likeliest token of each row of logits, in one launch. The twin is `torch.argmax`, which has one block of threads
for a row, and a launch before it.

Programs have a piece of a row each. A number that is larger for a larger logit, and of equals for the lower token, is
all that they tell each other; the last one of a row says what it comes to, and leaves all as it was found.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from shared.engine.kernels.triton_dense import launch_options

BLOCK = 2048
MOST_ROWS = 1024


@triton.jit(do_not_specialize=["size", "stride"])
def _likeliest(logits, out, best, arrived, size, stride, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_wait()
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    # Zeros below zero become zeros.
    values = tl.load(logits + row * stride + at, inside, 0.0, cache_modifier=".cg") + 0.0
    bits = values.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as large as the values are
    rank = (bits.to(tl.int64) << 32) | (0x7FFFFFFF - at).to(tl.int64)
    rank = tl.where(inside, rank, -(2**63))
    tl.atomic_max(best + row, tl.max(rank), sem="relaxed")
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        first = tl.atomic_xchg(best + row, -(2**63), sem="acquire")
        tl.store(out + row, 0x7FFFFFFF - (first & 0x7FFFFFFF))
        tl.store(arrived + row, 0)


class Likeliest:
    """For one stream of a device."""

    def __init__(self, device: torch.device) -> None:
        self._best = torch.full((MOST_ROWS,), -(2**63), dtype=torch.int64, device=device)
        self._arrived = torch.zeros(MOST_ROWS, dtype=torch.int32, device=device)

    def takes(self, logits: torch.Tensor) -> bool:
        """Whether it is for these [R, V]."""
        return logits.dtype == torch.float32 and 0 < len(logits) <= MOST_ROWS and logits.stride(1) == 1

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Of logits [R, V] that it `takes`: int64 [R]; of equals the first."""
        (num_rows, size), out = logits.shape, torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        pdl, options = launch_options(logits.device)
        _likeliest[(num_rows, triton.cdiv(size, BLOCK))](
            logits, out, self._best, self._arrived, size, logits.stride(0), BLOCK, pdl, num_warps=8, **options
        )
        return out
