"""What a step leaves in its pages: latents and index keys, behind their norms and rotation. Twin: `sparse_reference`.

For few rows they are written by programs of their own within the product that makes queries, a kernel earlier than a
kernel of their own would be, so that attention finds them there before the queries are ready.
"""

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shared.engine.kernels.gluon_rows import begin, product, tiling
from shared.engine.kernels.inputs import Norm, Rows, State


@gluon.jit
def _place(state, slot, page_stride, PAGE_SIZE: gl.constexpr, DIM: gl.constexpr):
    wide = slot.to(gl.int64)
    return state + (wide // PAGE_SIZE) * page_stride + (wide % PAGE_SIZE) * DIM


@gluon.jit
def _append_latent(
    source, row, slot, cos, sin, gain, latents, page_stride, eps,
    LATENT: gl.constexpr, HALF: gl.constexpr, PAGE_SIZE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The latent at `source` behind its norm, and its rotary key, into their slot."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [WARPS], [0])
    at, pair = gl.arange(0, LATENT, layout), gl.arange(0, HALF, layout)
    value = gl.load(source + at).to(gl.float32)
    value = (value * gl.rsqrt(gl.sum(value * value, 0) / LATENT + eps)).to(gl.bfloat16) * gl.load(gain + at)
    even = gl.load(source + LATENT + 2 * pair).to(gl.float32)
    odd = gl.load(source + LATENT + 2 * pair + 1).to(gl.float32)
    c, s = gl.load(cos + row * HALF + pair), gl.load(sin + row * HALF + pair)
    if slot >= 0:
        target = _place(latents, slot, page_stride, PAGE_SIZE, LATENT + 2 * HALF)
        gl.store(target + at, value)
        gl.store(target + LATENT + 2 * pair, (even * c - odd * s).to(gl.bfloat16))
        gl.store(target + LATENT + 2 * pair + 1, (odd * c + even * s).to(gl.bfloat16))


@gluon.jit
def _append_key(
    source, row, slot, cos, sin, gain, bias, keys, page_stride, eps,
    DIM: gl.constexpr, HALF: gl.constexpr, PAGE_SIZE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The index key at `source` behind its LayerNorm, its first dimensions rotated, into its slot."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    pair = gl.arange(0, DIM // 2, layout)
    even = gl.load(source + 2 * pair).to(gl.float32)
    odd = gl.load(source + 2 * pair + 1).to(gl.float32)
    mean = (gl.sum(even, 0) + gl.sum(odd, 0)) / DIM
    even, odd = even - mean, odd - mean
    scale = gl.rsqrt((gl.sum(even * even, 0) + gl.sum(odd * odd, 0)) / DIM + eps)
    even = even * scale * gl.load(gain + 2 * pair) + gl.load(bias + 2 * pair)
    odd = odd * scale * gl.load(gain + 2 * pair + 1) + gl.load(bias + 2 * pair + 1)
    even, odd = even.to(gl.bfloat16).to(gl.float32), odd.to(gl.bfloat16).to(gl.float32)
    c = gl.load(cos + row * HALF + pair, pair < HALF, 1.0)
    s = gl.load(sin + row * HALF + pair, pair < HALF, 0.0)
    if slot >= 0:
        target = _place(keys, slot, page_stride, PAGE_SIZE, DIM) + 2 * pair
        gl.store(target, (even * c - odd * s).to(gl.bfloat16))
        gl.store(target + 1, (odd * c + even * s).to(gl.bfloat16))


@gluon.jit
def _append(
    low, cos, sin, slots, latent_gain, key_gain, key_bias, latents, keys, row, low_stride, latent_page, key_page,
    eps, key_eps,
    Q_LORA: gl.constexpr, LATENT: gl.constexpr, HALF: gl.constexpr, INDEX_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """What a row leaves in its pages."""
    slot = gl.load(slots + row)
    source = low + row * low_stride + Q_LORA
    _append_latent(source, row, slot, cos, sin, latent_gain, latents, latent_page, eps, LATENT, HALF, PAGE_SIZE, WARPS)
    if INDEX_DIM > 0:
        key = source + LATENT + 2 * HALF
        _append_key(
            key, row, slot, cos, sin, key_gain, key_bias, keys, key_page, key_eps, INDEX_DIM, HALF, PAGE_SIZE, WARPS
        )


@gluon.jit
def _append_alone(
    low, cos, sin, slots, latent_gain, key_gain, key_bias, latents, keys, low_stride, latent_page, key_page,
    eps, key_eps,
    Q_LORA: gl.constexpr, LATENT: gl.constexpr, HALF: gl.constexpr, INDEX_DIM: gl.constexpr,
    PAGE_SIZE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    _append(
        low, cos, sin, slots, latent_gain, key_gain, key_bias, latents, keys, gl.program_id(0), low_stride, latent_page,
        key_page, eps, key_eps, Q_LORA, LATENT, HALF, INDEX_DIM, PAGE_SIZE, WARPS,
    )  # fmt: skip


@gluon.jit
def _product_and_append(
    gain, weight, out, num_rows, N, num_tiles,
    low, cos, sin, slots, latent_gain, key_gain, key_bias, latents, keys, low_stride, latent_page, key_page,
    eps, key_eps,
    Q_LORA: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, STEP: gl.constexpr,
    LATENT: gl.constexpr, HALF: gl.constexpr, INDEX_DIM: gl.constexpr, PAGE_SIZE: gl.constexpr,
    PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    if gl.program_id(0) < num_tiles:
        product(
            low, low, gain, weight, out, out, out, num_rows, low_stride, 0, N, eps,
            Q_LORA, ROWS, BLOCK, STEP, 1, 1, True, False, False, PDL, WARPS,
        )  # fmt: skip
    else:
        begin(low, PDL)
        _append(
            low, cos, sin, slots, latent_gain, key_gain, key_bias, latents, keys, gl.program_id(0) - num_tiles,
            low_stride, latent_page, key_page, eps, key_eps, Q_LORA, LATENT, HALF, INDEX_DIM, PAGE_SIZE, WARPS,
        )  # fmt: skip


def queries_and_state(
    low: torch.Tensor, weight: torch.Tensor, norm: Norm, rows: Rows, state: State, *, pdl: bool = True
) -> torch.Tensor:
    """The low query [T, q_lora], T <= MAX_ROWS, at the head of `low` behind its norm times weight' [N, q_lora], float32
    [T, N]; and what lies behind it into pages, as `append`."""
    num_rows, (n, k) = len(low), weight.shape
    cut, out = tiling(num_rows, n, k), torch.empty(num_rows, n, dtype=torch.float32, device=low.device)
    num_tiles = triton.cdiv(n, cut.rows)
    tensors, sizes = _appended(low, rows, state)
    _product_and_append[(num_tiles + num_rows,)](
        norm.gain, weight, out, num_rows, n, num_tiles, *tensors,
        k, triton.next_power_of_2(num_rows), cut.rows, cut.step, *sizes, pdl, cut.warps,
        num_warps=cut.warps, launch_pdl=pdl,
    )  # fmt: skip
    return out


def append(low: torch.Tensor, q_lora: int, rows: Rows, state: State) -> None:
    """Write each row's latent and rotary key, and where there is one its index key, into its slot.

    low [T, q_lora + latent + rope (+ index_dim ...)], before norms and rotation, rows may be strided.
    """
    tensors, sizes = _appended(low, rows, state)
    _append_alone[(len(low),)](*tensors, q_lora, *sizes, 4, num_warps=4)


def _appended(low: torch.Tensor, rows: Rows, state: State) -> tuple[tuple[object, ...], tuple[int, ...]]:
    norm, keys, latents = state.key_norm, state.keys, state.latents
    full = norm is not None and keys is not None
    gain, bias, eps = (norm.gain, norm.bias, norm.eps) if norm else (state.latent_gain, state.latent_gain, 0.0)
    held = keys if keys is not None and full else latents
    half = rows.cos.shape[1]
    tensors = (
        low, rows.cos, rows.sin, rows.own_slots, state.latent_gain, gain, bias, latents, held,
        low.stride(0), latents.stride(0), held.stride(0), state.latent_eps, eps,
    )  # fmt: skip
    return tensors, (latents.shape[2] - 2 * half, half, held.shape[2] if full else 0, latents.shape[1])
