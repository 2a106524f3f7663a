"""Products of few rows with a large matrix, at the speed of reading the matrix; what comes before them is fused in.

For up to MAX_ROWS rows (decode at small batches, verification) a product is bound by the bytes of its weights. Each
program reads a few rows of the matrix with wide loads and nothing between them; the RMSNorm in front is computed along
the way, by every program for itself: x is small and in the cache. Programs start while the kernel before them ends
(programmatic dependent launch) and by then have their first weights. Layouts are set by hand (Gluon), so that a thread
multiplies what it loaded; Triton's own choice moved it through shared memory. Twins: `reference.rms_norm`, `F.linear`.
"""

from dataclasses import dataclass, replace

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shared.engine.kernels.inputs import Norm

MAX_ROWS = 4  # from there on multiplying takes longer than reading
SMALL, LONG, LONGER = 6 << 20, 4096, 8192  # elements of a matrix, and of a row
VECTOR = 8  # values of 16 bits that a thread loads at once
WARP = 32
HELD = 3  # steps whose weights and activations find a place in registers, all at once


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a program reads: rows of the matrix, warps beside each other along a row, vectors of a thread at a time; and
    how many such steps it asks for at once."""

    rows: int
    warps: int
    vectors: int = 1
    at_once: int = 1

    @property
    def step(self) -> int:
        """Columns at a time."""
        return self.warps * self.vectors * WARP * VECTOR


@gluon.jit
def _wait(at):
    """As `triton_early.wait`."""
    gl.inline_asm_elementwise(
        "griddepcontrol.wait; ld.acquire.gpu.global.u32 $0, [$1];",
        "=r,l,~{memory}",
        [at.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _release():
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def begin(at, pdl: gl.constexpr):
    """Let the next kernel start, and wait for the memory of the one before; `at` points to any global memory."""
    if pdl:
        _release()
        _wait(at)


@gluon.jit
def begin_in_turn(at, pdl: gl.constexpr):
    """As `begin`, the other way round: what the next kernel finds before it waits itself is whatever was written by all
    kernels but this one."""
    if pdl:
        _wait(at)
        _release()


@gluon.jit
def _added(x, delta):
    """The sum of two blocks of bfloat16, rounded to it: two at once."""
    return gl.inline_asm_elementwise(
        "add.rn.bf16x2 $0, $1, $2;", "=r,r,r", [x, delta], dtype=gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def _steps(at, inside, STEP: gl.constexpr, AT_ONCE: gl.constexpr):
    """What lies at `at` and so many steps on, all asked for before any has come."""
    loaded = ()
    for i in gl.static_range(AT_ONCE):  # Gluon compiles no starred tuple
        loaded = loaded + (gl.load(at + i * STEP, inside, 0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return loaded


@gluon.jit
def product(
    x, delta, gain, weight, out, total, normed, num_rows, x_stride, delta_stride, N, eps,
    K: gl.constexpr, ROWS: gl.constexpr, BLOCK: gl.constexpr, STEP: gl.constexpr, AT_ONCE: gl.constexpr,
    SLICE: gl.constexpr, NORM: gl.constexpr, ADD: gl.constexpr, KEEP: gl.constexpr, PDL: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """The kernel of `launch`, and a part of others. AT_ONCE steps of K // STEP are asked for at once."""
    # [rows of x, rows of the matrix, vectors, values of a vector]
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 1, 8], [1, 1, 32, 1], [1, 1, WARPS, 1], [3, 2, 1, 0])
    of_w: gl.constexpr = gl.SliceLayout(0, layout)
    of_x: gl.constexpr = gl.SliceLayout(1, layout)
    of_gain: gl.constexpr = gl.SliceLayout(0, of_x)
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
    VECTORS: gl.constexpr = STEP // 8

    n = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, gl.SliceLayout(2, of_w)))
    inside = (n < N)[:, None][:, :, None]
    v = gl.arange(0, VECTORS, gl.SliceLayout(0, gl.SliceLayout(2, of_w)))[None, :][:, :, None] * 8
    v += gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, of_w)))[None, :][:, None, :]
    place = weight + n.to(gl.int64)[:, None][:, :, None] * K + v

    row = gl.arange(0, ROWS, gl.SliceLayout(1, gl.SliceLayout(2, of_x)))
    used = (row < num_rows)[:, None][:, :, None]
    k = gl.arange(0, VECTORS, gl.SliceLayout(0, gl.SliceLayout(2, of_x)))[None, :][:, :, None] * 8
    k += gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, of_x)))[None, :][:, None, :]
    source = x + row[:, None][:, :, None] * x_stride + k
    other = delta + row[:, None][:, :, None] * delta_stride + k
    g = (
        gl.arange(0, VECTORS, gl.SliceLayout(1, of_gain))[:, None] * 8
        + gl.arange(0, 8, gl.SliceLayout(0, of_gain))[None, :]
    )
    at_row = gl.arange(0, ROWS, gl.SliceLayout(1, flat))[:, None]
    at = gl.program_id(0) * SLICE + gl.arange(0, SLICE, gl.SliceLayout(0, flat))[None, :]  # that are kept
    own = (at_row < num_rows) & (at < K)

    ahead = _steps(place, inside, STEP, AT_ONCE)
    begin(x, PDL)
    if KEEP:
        kept = gl.load(x + at_row * x_stride + at, own, 0.0).to(gl.float32)
        if ADD:
            kept += gl.load(delta + at_row * delta_stride + at, own, 0.0).to(gl.float32)
        kept = kept.to(gl.bfloat16)
        kept_gain = gl.load(gain + at, at < K, 0.0)
    sums = gl.zeros([ROWS, BLOCK, VECTORS], gl.float32, gl.SliceLayout(3, layout))
    squares = gl.zeros([ROWS, VECTORS], gl.float32, gl.SliceLayout(2, of_x))
    for start in gl.static_range(0, K, STEP * AT_ONCE):
        ws = ahead
        if start + STEP * AT_ONCE < K:
            ahead = _steps(place + (start + STEP * AT_ONCE), inside, STEP, AT_ONCE)
        values = _steps(source + start, used, STEP, AT_ONCE)
        if ADD:
            others = _steps(other + start, used, STEP, AT_ONCE)
        if NORM:
            gains = _steps(gain + (g + start), g >= 0, STEP, AT_ONCE)
        for i in gl.static_range(AT_ONCE):
            value = values[i]
            if ADD:
                value = _added(value, others[i])
            value = value.to(gl.float32)
            if NORM:
                squares += gl.sum(value * value, 2)
                value = value * gl.expand_dims(gains[i].to(gl.float32), 0)
            sums += gl.sum(gl.expand_dims(ws[i].to(gl.float32), 0) * gl.expand_dims(value, 1), 3)
    result = gl.convert_layout(gl.sum(sums, 2), flat)
    at_n = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, flat))[None, :]
    if NORM:
        scale = gl.rsqrt(gl.sum(squares, 1) / K + eps)
        scale = gl.expand_dims(gl.convert_layout(scale, gl.SliceLayout(1, flat)), 1)
        result = result * scale
        if KEEP:
            gl.store(total + at_row * K + at, kept, own)
            value = kept.to(gl.float32) * scale * kept_gain.to(gl.float32)
            gl.store(normed + at_row * K + at, value.to(normed.dtype.element_ty), own)
    gl.store(out + at_row * N + at_n, result.to(out.dtype.element_ty), (at_row < num_rows) & (at_n < N))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: Norm | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    pdl: bool = True,
) -> torch.Tensor:
    """x [T, K], T <= MAX_ROWS, behind `norm` or as it is, times weight' [N, K] -> [T, N] of `dtype`.

    Rows of x and delta may be strided. With `pdl` the kernel starts before the one in front of it has ended.
    """
    return launch(x, weight, norm, None, dtype, tiling(len(x), *weight.shape), pdl=pdl)


def linear_keeping(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: Norm,
    dtype: torch.dtype = torch.float32,
    *,
    kept: torch.dtype = torch.bfloat16,
    pdl: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `linear`; also the sum that was normed (the residual), bfloat16 [T, K], and what came of it, `kept`."""
    total, normed = (torch.empty(x.shape, dtype=own, device=x.device) for own in (torch.bfloat16, kept))
    out = launch(x, weight, norm, (total, normed), dtype, tiling(len(x), *weight.shape), pdl=pdl)
    return out, total, normed


def tiling(num_rows: int, n: int, k: int) -> Tiling:
    """How a product is cut up: enough programs for every multiprocessor, wide enough loads for each (docs/LOG.md)."""
    most = (k & -k) // (WARP * VECTOR)
    small, long = n * k < SMALL, k > LONG
    if k > LONGER and most >= 8:
        return Tiling(4, 4, 2)
    if small and long:
        cut = Tiling(4, min(8, most))
        return replace(cut, at_once=k // cut.step if k <= HELD * cut.step else 1)
    if num_rows == 1 and small:
        return Tiling(2, min(4, most))
    return Tiling(8 if long and num_rows <= 2 else 4, min(4, most))


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: Norm | None,
    kept: tuple[torch.Tensor, torch.Tensor] | None,
    dtype: torch.dtype,
    cut: Tiling,
    *,
    pdl: bool,
) -> torch.Tensor:
    """One product, cut as told."""
    num_rows, (n, k) = len(x), weight.shape
    out = torch.empty(num_rows, n, dtype=dtype, device=x.device)
    delta = norm.delta if norm else None
    total, normed = kept or (out, out)
    num_programs = triton.cdiv(n, cut.rows)
    product[(num_programs,)](
        x, x if delta is None else delta, norm.gain if norm else x, weight, out, total, normed,
        num_rows, x.stride(0), 0 if delta is None else delta.stride(0), n, norm.eps if norm else 0.0,
        k, triton.next_power_of_2(num_rows), cut.rows, cut.step, cut.at_once,
        triton.next_power_of_2(triton.cdiv(k, num_programs)),
        norm is not None, delta is not None, kept is not None, pdl, cut.warps, num_warps=cut.warps, launch_pdl=pdl,
    )  # fmt: skip
    return out
