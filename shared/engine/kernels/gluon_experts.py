"""The chosen experts of few tokens, at the speed of reading them; weights in NVFP4 or bfloat16.

Two kernels: the inner values of every chosen expert, silu(gate) * up; and their way down, weighted and summed in the
order of the choice together with the shared expert. Each choice is computed on its own: few tokens seldom choose the same
expert, and where they do its weights come from the cache. FP4 codes become fp16 by shifts alone: as bits of an fp16 a
code is its value * 2^-14, as those of a scale (e4m3) it is the value * 2^-8. The twin is `moe_reference`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shared.engine.kernels import triton_dense
from shared.engine.kernels.gluon_rows import begin
from shared.engine.quantization import nvfp4
from shared.engine.quantization.nvfp4 import Nvfp4Tensor

MAX_TOKENS = 64
UNIT_BYTES = 16  # what a thread loads at once: 32 codes or 8 bfloat16
FACTOR = 2.0**22  # of codes and scales as above


@dataclass(frozen=True, slots=True)
class Experts:
    """E experts' gate and up joined [E, 2 I, hidden], and down [E, hidden, I]. Without scales these are bfloat16.

    With scales they are codes, two to a byte, uint8: byte j of a row of K is element j (low) and element K / 2 + j;
    scales are e4m3 as uint8, one for 16 elements in their order; `factors` float32 [E, 2] are the scales of the
    matrices times FACTOR.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    @property
    def inner(self) -> int:
        """I."""
        return self.gate_up.shape[1] // 2


def pair_halves(codes: torch.Tensor) -> torch.Tensor:
    """ModelOpt's order (neighbours in a byte) [..., K/2] to that of `Experts`."""
    low, high = nvfp4.unpack(codes).chunk(2, dim=-1)
    return (low | high << 4).to(torch.uint8)


def packed(gate_up: Sequence[Nvfp4Tensor], down: Sequence[Nvfp4Tensor]) -> Experts:
    """Expert by expert: gate and up joined [2 I, hidden], which share a scale, and down [hidden, I]."""
    codes, scales = (
        [[pair_halves(one.codes) for one in part] for part in (gate_up, down)],
        [[one.scale.view(torch.uint8) for one in part] for part in (gate_up, down)],
    )
    factors = [torch.stack([one.scale_2 for one in part]) for part in (gate_up, down)]
    joined = [torch.stack(part) for part in (*codes, *scales)]
    return Experts(*joined, torch.stack(factors, dim=1) * FACTOR)


@gluon.jit
def _decode(codes):
    """uint8 [..., 16] -> the low and the high codes as float32 [..., 16]: the value times 2^-14."""
    low, high = gl.inline_asm_elementwise(
        """
        {
        .reg .b32 a, b, s, t;
        prmt.b32 a, $4, 0, 0x1404;
        prmt.b32 b, $4, 0, 0x3424;
        shl.b32 s, a, 4;
        shl.b32 t, a, 1;
        and.b32 t, t, 0x0E000E00;
        lop3.b32 $0, s, 0x80008000, t, 0xEA;
        shl.b32 s, b, 4;
        shl.b32 t, b, 1;
        and.b32 t, t, 0x0E000E00;
        lop3.b32 $1, s, 0x80008000, t, 0xEA;
        shr.b32 t, a, 3;
        and.b32 t, t, 0x0E000E00;
        lop3.b32 $2, a, 0x80008000, t, 0xEA;
        shr.b32 t, b, 3;
        and.b32 t, t, 0x0E000E00;
        lop3.b32 $3, b, 0x80008000, t, 0xEA;
        }
        """,
        "=r,=r,=r,=r,r",
        [codes],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=4,
    )
    return low.to(gl.float32), high.to(gl.float32)


@gluon.jit
def _scale(bits):
    """e4m3 without a sign, as uint8, to float32: the value times 2^-8."""
    return (bits.to(gl.int16) << 7).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _gate_up(
    x, chosen, weight, scale, factors, out,
    K: gl.constexpr, INNER: gl.constexpr, TOP_K: gl.constexpr, BLOCK: gl.constexpr, UNITS: gl.constexpr,
    PACKED: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    EACH: gl.constexpr = 16 if PACKED else 8
    ALL: gl.constexpr = K // 32 if PACKED else K // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 1, EACH], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    of_x: gl.constexpr = gl.SliceLayout(0, layout)
    choice = gl.program_id(0)
    r = gl.arange(0, 2 * BLOCK, gl.SliceLayout(1, gl.SliceLayout(2, layout)))  # gate and up take turns
    n = gl.program_id(1) * BLOCK + r // 2 + (r % 2) * INNER
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]
    x_unit = gl.arange(0, UNITS, gl.SliceLayout(1, of_x))[:, None]
    each = gl.arange(0, EACH, gl.SliceLayout(0, of_x))[None, :]
    w_each = gl.arange(0, EACH, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, :][:, None, :]
    source = x + (choice // TOP_K) * K + x_unit * EACH + each
    begin(PDL)
    expert = gl.load(chosen + choice).to(gl.int64)
    row = expert * 2 * INNER + n
    sums = gl.zeros([2 * BLOCK, UNITS], gl.float32, gl.SliceLayout(2, layout))
    for start in gl.static_range(0, ALL, UNITS):
        inside, x_inside = unit + start < ALL, x_unit + start < ALL
        if PACKED:
            place = weight + row[:, None][:, :, None] * (K // 2) + (unit + start)[:, :, None] * EACH + w_each
            codes = gl.load(place, inside[:, :, None], 0)
            scales = scale + row[:, None] * (K // 16) + (unit + start)
            low_scale, high_scale = gl.load(scales, inside, 0), gl.load(scales + K // 32, inside, 0)
            low_x = gl.load(source + start * EACH, x_inside, 0.0)
            high_x = gl.load(source + (start * EACH + K // 2), x_inside, 0.0)
            low, high = _decode(codes)
            sums += gl.sum(low * gl.expand_dims(low_x.to(gl.float32), 0), 2) * _scale(low_scale)
            sums += gl.sum(high * gl.expand_dims(high_x.to(gl.float32), 0), 2) * _scale(high_scale)
        else:
            place = weight + row[:, None][:, :, None] * K + (unit + start)[:, :, None] * EACH + w_each
            w = gl.load(place, inside[:, :, None], 0.0)
            value = gl.load(source + start * EACH, x_inside, 0.0)
            sums += gl.sum(w.to(gl.float32) * gl.expand_dims(value.to(gl.float32), 0), 2)
    flat: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0])
    both = gl.convert_layout(gl.reshape(gl.sum(sums, 1), [BLOCK, 2]), flat)
    gate, up = gl.split(both)
    if PACKED:
        factor = gl.load(factors + expert * 2)
        gate, up = gate * factor, up * factor
    at = choice * INNER + gl.program_id(1) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, flat))
    gl.store(out + at, (gate / (1 + gl.exp(-gate)) * up).to(gl.bfloat16))


@gluon.jit
def _down(
    inner, chosen, weights, weight, scale, factors, shared, shared_weight, shared_stride, out,
    K: gl.constexpr, N: gl.constexpr, SHARED: gl.constexpr, TOP_K: gl.constexpr, AT_ONCE: gl.constexpr,
    BLOCK: gl.constexpr, LANES: gl.constexpr, PACKED: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    EACH: gl.constexpr = 16 if PACKED else 8
    UNITS: gl.constexpr = K // 32 if PACKED else K // 8
    ROW: gl.constexpr = K // 2 if PACKED else K
    # [choices, rows, units, values of a unit]
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, EACH], [1, 32 // LANES, LANES, 1], [1, WARPS, 1, 1], [3, 2, 1, 0]
    )
    of_rows: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, layout))
    of_inner: gl.constexpr = gl.SliceLayout(1, layout)
    whole: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [WARPS, 1], [1, 0])
    token = gl.program_id(1)
    n = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, whole))
    k = gl.arange(0, SHARED, gl.SliceLayout(0, whole))
    c = gl.arange(0, AT_ONCE, gl.SliceLayout(1, of_rows))
    rows = gl.program_id(0) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(0, of_rows))
    units = gl.arange(0, UNITS, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
    unit = gl.expand_dims(gl.expand_dims(units, 0), 1)
    part = gl.arange(0, AT_ONCE, gl.SliceLayout(1, gl.SliceLayout(2, of_inner)))[:, None] * K
    part += gl.arange(0, UNITS, gl.SliceLayout(0, gl.SliceLayout(2, of_inner)))[None, :] * EACH
    each = gl.arange(0, EACH, gl.SliceLayout(0, gl.SliceLayout(1, of_inner)))[None, :][:, None, :]
    within = unit[:, :, :, None] * EACH + gl.expand_dims(each, 1)
    shared_row = gl.load(shared_weight + n[:, None] * SHARED + k[None, :])
    # The choice is older than the kernel in front, whose own results alone must be waited for.
    expert = gl.load(chosen + token * TOP_K + c, cache_modifier=".cg").to(gl.int64)
    row = expert[:, None] * N + rows[None, :]
    ahead = gl.load(weight + row[:, :, None][:, :, :, None] * ROW + within)
    begin(PDL)
    gate = gl.load(shared + token * shared_stride + k).to(gl.float32)
    up = gl.load(shared + token * shared_stride + SHARED + k).to(gl.float32)
    own = (gate / (1 + gl.exp(-gate)) * up).to(gl.bfloat16).to(gl.float32)
    result = gl.convert_layout(gl.sum(shared_row.to(gl.float32) * own[None, :], 1), gl.SliceLayout(0, of_rows))
    for first in gl.static_range(0, TOP_K, AT_ONCE):
        choice = token * TOP_K + first + c
        w, value = ahead, gl.load(weights + choice)
        if PACKED:
            scales = scale + row[:, :, None] * (K // 16) + unit
            low_scale, high_scale = gl.load(scales), gl.load(scales + K // 32)
            value = value * gl.load(factors + expert * 2 + 1)
        if first + AT_ONCE < TOP_K:
            expert = gl.load(chosen + choice + AT_ONCE).to(gl.int64)
            row = expert[:, None] * N + rows[None, :]
            ahead = gl.load(weight + row[:, :, None][:, :, :, None] * ROW + within)
        source = inner + (token * TOP_K + first) * K + part[:, :, None] + each
        act = gl.load(source).to(gl.float32)
        if PACKED:
            low, high = _decode(w)
            sums = gl.sum(low * gl.expand_dims(act, 1), 3) * _scale(low_scale)
            act = gl.load(source + K // 2).to(gl.float32)
            sums += gl.sum(high * gl.expand_dims(act, 1), 3) * _scale(high_scale)
        else:
            sums = gl.sum(w.to(gl.float32) * gl.expand_dims(act, 1), 3)
        sums = sums * value[:, None][:, :, None]
        result += gl.sum(gl.sum(sums, 2), 0)
    at = token * N + rows
    gl.store(out + at, result.to(gl.bfloat16))


def mixture(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    shared: torch.Tensor,
    shared_down: torch.Tensor,
    *,
    pdl: bool = True,
) -> torch.Tensor:
    """The weighted sum of the chosen experts and the shared one, bfloat16 [T, hidden].

    x bfloat16 [T, hidden]; chosen int32 and weights float32 [T, k]; `shared` [T, 2 I'] is gate and up of the shared
    expert (rows may be strided), `shared_down` [hidden, I'].
    """
    inner = gate_up(x, chosen, experts, pdl=pdl)
    return down(inner, chosen, weights, experts, shared, shared_down, pdl=pdl)


def gate_up(
    x: torch.Tensor, chosen: torch.Tensor, experts: Experts, *, block: int = 2, warps: int = 4, pdl: bool = True
) -> torch.Tensor:
    """silu(gate) * up of every choice, bfloat16 [T, k, I]."""
    (num_rows, hidden), top_k, packed = x.shape, chosen.shape[1], experts.factors is not None
    out = torch.empty(num_rows, top_k, experts.inner, dtype=torch.bfloat16, device=x.device)
    num_units = hidden // (2 * UNIT_BYTES if packed else UNIT_BYTES // 2)
    units = min(256, triton.next_power_of_2(num_units))
    _gate_up[(num_rows * top_k, experts.inner // block)](
        x, chosen, experts.gate_up, _or(experts.gate_up_scale, x), _or(experts.factors, x), out,
        hidden, experts.inner, top_k, block, units, packed, pdl, warps, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return out


def down(
    inner: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    shared: torch.Tensor,
    shared_down: torch.Tensor,
    *,
    block: int = 32,
    at_once: int = 0,
    warps: int = 8,
    pdl: bool = True,
) -> torch.Tensor:
    """From `gate_up`'s result on; see `mixture`."""
    num_rows, top_k = chosen.shape
    hidden, packed = experts.down.shape[1], experts.factors is not None
    out = torch.empty(num_rows, hidden, dtype=torch.bfloat16, device=inner.device)
    num_units = experts.inner // (2 * UNIT_BYTES if packed else UNIT_BYTES // 2)
    _down[(triton.cdiv(hidden, block), num_rows)](
        inner, chosen, weights, experts.down, _or(experts.down_scale, inner), _or(experts.factors, inner),
        shared, shared_down, shared.stride(0), out,
        experts.inner, hidden, shared_down.shape[1], top_k, min(at_once or (4 if packed else 2), top_k), block, min(32, num_units),
        packed, pdl, warps, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return out


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor


def dequantize(codes: torch.Tensor, scale: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Codes and scales as in `Experts` and a factor for each expert to bfloat16 [E, N, K], expert by expert."""
    magnitudes = torch.tensor(nvfp4.MAGNITUDES + tuple(-m for m in nvfp4.MAGNITUDES), device=codes.device)
    out = torch.empty(*codes.shape[:2], codes.shape[2] * 2, dtype=torch.bfloat16, device=codes.device)
    for expert, factor in enumerate((factors / FACTOR).unbind()):
        own = codes[expert]
        values = magnitudes[torch.cat((own & 15, own >> 4), dim=-1).int()]
        wide = scale[expert].view(torch.float8_e4m3fn).float() * factor
        out[expert] = (values.unflatten(-1, (-1, nvfp4.GROUP)) * wide[..., None]).flatten(-2)
    return out


def plain_gate_up(experts: Experts) -> torch.Tensor:
    """In bfloat16."""
    if experts.factors is None or experts.gate_up_scale is None:
        return experts.gate_up
    return dequantize(experts.gate_up, experts.gate_up_scale, experts.factors[:, 0])


def plain_down(experts: Experts) -> torch.Tensor:
    """In bfloat16."""
    if experts.factors is None or experts.down_scale is None:
        return experts.down
    return dequantize(experts.down, experts.down_scale, experts.factors[:, 1])


def large_mixture(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    shared: torch.Tensor,
    shared_down: torch.Tensor,
) -> torch.Tensor:
    """As `mixture`, for many tokens: those of each expert together, as one grouped product."""
    num_rows, top_k = chosen.shape
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=len(experts.gate_up)).cumsum(0).int()
    inner = torch._grouped_mm(x[order // top_k], plain_gate_up(experts).transpose(1, 2), offs=ends)
    parts = torch._grouped_mm(triton_dense.silu_mul(inner), plain_down(experts).transpose(1, 2), offs=ends)
    own = torch.empty_like(parts)
    own[order] = parts
    total = F.linear(triton_dense.silu_mul(shared.contiguous()).to(x.dtype), shared_down).float()
    total += (own.view(num_rows, top_k, -1).float() * weights[..., None]).sum(1)
    return total.to(x.dtype)
