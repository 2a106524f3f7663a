"""What steps of GLM begin with. A model's: the rows of the embedding that a rank has, and the angles by which positions
turn, in one launch; torch needs a dozen, each of them longer than what it computes. That of its MTP layer: two norms
beside each other. The twins are `vocabulary.Embedding` with `rope.table`, and `reference.rms_norm`."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.kernels.triton_dense import launch_options

BLOCK = 2048


@triton.jit
def _begin(
    tokens, positions, table, frequencies, out, cos, sin, first_token, num_tokens, size,
    BLOCK: tl.constexpr, HALF: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Not from L1, which may hold what was there before.
    token = tl.load(tokens + row, cache_modifier=".cg").to(tl.int64) - first_token
    is_ours = (token >= 0) & (token < num_tokens)
    value = tl.load(table + token * size + column, is_ours & (column < size), 0.0)
    tl.store(out + row * size + column, value, column < size)
    if tl.program_id(1) == 0:
        half = tl.arange(0, HALF)
        angle = tl.load(positions + row, cache_modifier=".cg").to(tl.float32) * tl.load(frequencies + half)
        tl.store(cos + row * HALF + half, tl.cos(angle))
        tl.store(sin + row * HALF + half, tl.sin(angle))


def begin(
    token_ids: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, first_token: int, frequencies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of a `table` [V, N] that begins with `first_token`, zeros for tokens that are not in it, [T, N]; and cos and
    sin of the positions' angles, float32 [T, D / 2], a power of two. token_ids and positions are int32 [T]."""
    num_rows, (num_tokens, size), half = len(token_ids), table.shape, len(frequencies)
    out = table.new_empty(num_rows, size)
    cos, sin = (torch.empty(num_rows, half, dtype=torch.float32, device=table.device) for _ in range(2))
    pdl, options = launch_options(table.device)
    _begin[(num_rows, triton.cdiv(size, BLOCK))](
        token_ids, positions, table, frequencies, out, cos, sin, first_token, num_tokens, size,
        BLOCK, half, pdl, num_warps=8, **options,
    )  # fmt: skip
    return out, cos, sin


@triton.jit
def _norms(x, y, x_gain, y_gain, out, size, x_stride, y_stride, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
    row, is_second, at = tl.program_id(0).to(tl.int64), tl.program_id(1) == 1, tl.arange(0, BLOCK)
    inside = at < size
    gain = tl.load(tl.where(is_second, y_gain, x_gain) + at, inside, 0.0)
    if PDL:
        gdc_wait()
    source = tl.where(is_second, y + row * y_stride, x + row * x_stride)
    wide = tl.load(source + at, inside, 0.0, cache_modifier=".cg").to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide) / size + eps)
    value = (wide * scale).to(gain.dtype).to(tl.float32) * gain.to(tl.float32)
    tl.store(out + (2 * row + tl.program_id(1)) * size + at, value.to(gain.dtype), inside)


def norms(x: torch.Tensor, y: torch.Tensor, gains: tuple[torch.Tensor, torch.Tensor], eps: float) -> torch.Tensor:
    """The RMSNorms of x and y [T, N] beside each other [T, 2 N], each with its own gain [N]."""
    num_rows, size = x.shape
    out = x.new_empty(num_rows, 2 * size)
    block, (pdl, options) = triton.next_power_of_2(size), launch_options(x.device)
    _norms[(num_rows, 2)](
        x, y, *gains, out, size, x.stride(0), y.stride(0), eps, block, pdl,
        num_warps=min(16, max(1, block // 512)), **options,
    )  # fmt: skip
    return out
