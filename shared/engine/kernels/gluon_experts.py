"""The chosen experts of few tokens, at the speed of reading them; weights in NVFP4 or bfloat16.

Two kernels: the inner values of every chosen expert, silu(gate) * up; and their way down, weighted and summed in the
order of the choice together with the shared expert. Each choice is computed on its own: few tokens seldom choose the
same expert, and where they do its weights come from the cache. The twin is `layers.moe.Moe`.
"""

import torch
import torch.nn.functional as F
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shared.engine.kernels import triton_dense, triton_grouped, triton_members, triton_mixture
from shared.engine.kernels.experts import Experts, SharedExpert
from shared.engine.kernels.gluon_dots import decode, dots, fetch, packed_sums, plain_sums, scale_of
from shared.engine.kernels.gluon_rows import begin, begin_in_turn
from shared.errors import Unsupported

MAX_TOKENS = 64
# Where codes multiply them, inner values are kept as fp16 times SMALLER, and sums of sixteen products are fp16 too.
SMALLER, LARGEST = gl.constexpr(1 / 64), gl.constexpr(10_000.0)
MOST = 10_000.0  # what activations may be for these sums to be no larger than an fp16
UNIT_BYTES = 16  # what a thread loads at once: 32 codes or 8 bfloat16


@gluon.jit
def _gated(sums, factor, BLOCK: gl.constexpr, layout: gl.constexpr):
    """silu(gate) * up [BLOCK] of rows of which gate and up take turns."""
    both = gl.convert_layout(gl.reshape(gl.sum(sums, 1), [BLOCK, 2]), layout)
    gate, up = gl.split(both)
    gate, up = gate * factor, up * factor
    return gate / (1 + gl.exp(-gate)) * up


@gluon.jit
def _gate_up(
    x, chosen, weight, scale, factors, shared_weight, out, shared_out, num_choices,
    K: gl.constexpr, INNER: gl.constexpr, SHARED: gl.constexpr, TOP_K: gl.constexpr, BLOCK: gl.constexpr,
    UNITS: gl.constexpr, PACKED: gl.constexpr, FETCH: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    EACH: gl.constexpr = 16 if PACKED else 8
    layout: gl.constexpr = gl.BlockedLayout([1, 1, EACH], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    plain: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 32, 1], [1, WARPS, 1], [2, 1, 0])
    flat: gl.constexpr = gl.BlockedLayout([1, 2], [32, 1], [WARPS, 1], [1, 0])
    choice = gl.program_id(0)
    at = gl.program_id(1) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, flat))
    if choice < num_choices:
        of_x: gl.constexpr = gl.SliceLayout(0, layout)
        r = gl.arange(0, 2 * BLOCK, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
        source = x + (choice // TOP_K) * K + gl.arange(0, UNITS, gl.SliceLayout(1, of_x))[:, None] * EACH
        source += gl.arange(0, EACH, gl.SliceLayout(0, of_x))[None, :]
        begin_in_turn(x, PDL)
        expert = gl.load(chosen + choice).to(gl.int64)
        row = expert * 2 * INNER + gl.program_id(1) * BLOCK + r // 2 + (r % 2) * INNER
        if PACKED:
            sums = packed_sums(source, weight, scale, row, K, UNITS, layout)
            result = _gated(sums, gl.load(factors + expert * 2) * 16, BLOCK, flat) * SMALLER
            result = gl.minimum(gl.maximum(result, -LARGEST), LARGEST)
        else:
            result = _gated(plain_sums(source, weight, row, K, UNITS, layout, False), 1.0, BLOCK, flat)
        gl.store(out + choice * INNER + at, result.to(out.dtype.element_ty))
    elif gl.program_id(1) * BLOCK < SHARED:
        of_plain: gl.constexpr = gl.SliceLayout(0, plain)
        r2 = gl.arange(0, 2 * BLOCK, gl.SliceLayout(1, gl.SliceLayout(2, plain)))
        own = x + (choice - num_choices) * K + gl.arange(0, UNITS, gl.SliceLayout(1, of_plain))[:, None] * 8
        own += gl.arange(0, 8, gl.SliceLayout(0, of_plain))[None, :]
        own_row = gl.program_id(1) * BLOCK + r2 // 2 + (r2 % 2) * SHARED
        if FETCH:  # beyond what is loaded at once: the routed experts must wait for the choice, this needs not
            fetch(shared_weight, gl.program_id(1) * BLOCK, K, UNITS * 8, BLOCK, WARPS)
            fetch(shared_weight, SHARED + gl.program_id(1) * BLOCK, K, UNITS * 8, BLOCK, WARPS)
        own_sums = plain_sums(own, shared_weight, own_row, K, UNITS, plain, PDL)
        gl.store(shared_out + (choice - num_choices) * SHARED + at, _gated(own_sums, 1.0, BLOCK, flat).to(gl.bfloat16))


@gluon.jit
def _down(
    inner, chosen, weights, weight, scale, factors, shared, shared_weight, out,
    K: gl.constexpr, N: gl.constexpr, SHARED: gl.constexpr, TOP_K: gl.constexpr, AT_ONCE: gl.constexpr,
    BLOCK: gl.constexpr, LANES: gl.constexpr, PACKED: gl.constexpr, PDL: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    EACH: gl.constexpr = 16 if PACKED else 8
    UNITS: gl.constexpr = K // 32 if PACKED else K // 8
    ROW: gl.constexpr = K // 2 if PACKED else K
    # [choices, rows, units, values of a unit]
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 1, EACH], [1, 32 // LANES, LANES, 1], [1, WARPS, 1, 1], [3, 2, 1, 0])
    of_rows: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, layout))
    of_sums: gl.constexpr = gl.SliceLayout(3, layout)
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
    begin(shared, PDL)
    own = gl.load(shared + token * SHARED + k).to(gl.float32)
    result = gl.convert_layout(gl.sum(shared_row.to(gl.float32) * own[None, :], 1), gl.SliceLayout(0, of_rows))
    for first in gl.static_range(0, TOP_K, AT_ONCE):
        choice = token * TOP_K + first + c
        w, value = ahead, gl.load(weights + choice)
        if PACKED:
            scales = scale + row[:, :, None] * (K // 16) + unit
            low_scale, high_scale = gl.load(scales), gl.load(scales + K // 32)
            value = value * gl.load(factors + expert * 2 + 1) * (16 / SMALLER)
        if first + AT_ONCE < TOP_K:
            expert = gl.load(chosen + choice + AT_ONCE).to(gl.int64)
            row = expert[:, None] * N + rows[None, :]
            ahead = gl.load(weight + row[:, :, None][:, :, :, None] * ROW + within)
        source = inner + (token * TOP_K + first) * K + part[:, :, None] + each
        act = gl.expand_dims(gl.load(source), 1)
        if PACKED:
            low, high = decode(w)
            sums = dots(low, act, of_sums) * scale_of(low_scale)
            sums += dots(high, gl.expand_dims(gl.load(source + K // 2), 1), of_sums) * scale_of(high_scale)
        else:
            sums = gl.sum(w.to(gl.float32) * act.to(gl.float32), 3)
        sums = sums * value[:, None][:, :, None]
        result += gl.sum(gl.sum(sums, 2), 0)
    at = token * N + rows
    gl.store(out + at, result.to(gl.bfloat16))


def mixture(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    shared: SharedExpert,
    *,
    pdl: bool = True,
) -> torch.Tensor:
    """The weighted sum of the chosen experts and the shared one, bfloat16 [T, hidden].

    x [T, hidden], in the dtype of `activations`; chosen int32 and weights float32 [T, k].
    """
    inner, own = gate_up(x, chosen, experts, shared, pdl=pdl)
    return down(inner, own, chosen, weights, experts, shared, pdl=pdl)


def activations(experts: Experts) -> torch.dtype:
    """What multiplies their weights: codes are multiplied two at a time, which fp16 loses less by than bfloat16."""
    return torch.bfloat16 if experts.factors is None else torch.float16


def require_small(gain: torch.Tensor) -> None:
    """Raise Unsupported if a norm with such a `gain` [hidden] may give what is too large for codes to multiply.

    No value behind a norm is larger than the root of how many there are, times its gain.
    """
    largest = float(gain.abs().max())
    if largest * len(gain) ** 0.5 > MOST:
        raise Unsupported(f"behind a norm with a gain of {largest:.3g} activations may be too large for NVFP4 experts")


def gate_up(
    x: torch.Tensor,
    chosen: torch.Tensor,
    experts: Experts,
    shared: SharedExpert,
    *,
    block: int = 0,
    warps: int = 0,
    pdl: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """silu(gate) * up of every choice [T, k, I], in the dtype of `activations`, and of the shared expert, bfloat16
    [T, I']."""
    (num_rows, hidden), top_k, packed = x.shape, chosen.shape[1], experts.factors is not None
    block = block or (1 if packed and num_rows == 1 else 2)
    out = torch.empty(num_rows, top_k, experts.inner, dtype=activations(experts), device=x.device)
    shared_inner = shared.down.shape[1]
    own = torch.empty(num_rows, shared_inner, dtype=torch.bfloat16, device=x.device)
    num_units = hidden // (2 * UNIT_BYTES if packed else UNIT_BYTES // 2)
    warps = min(warps or (2 if packed else 4), max(1, (num_units & -num_units) // 32))
    fetches = num_rows == 1 and hidden > 32 * warps * (UNIT_BYTES // 2)  # of more rows it takes from what they read
    _gate_up[(num_rows * top_k + num_rows, max(experts.inner, shared_inner) // block)](
        x, chosen, experts.gate_up, _or(experts.gate_up_scale, x), _or(experts.factors, x), shared.gate_up,
        out, own, num_rows * top_k,
        hidden, experts.inner, shared_inner, top_k, block, 32 * warps, packed, fetches, pdl, warps,
        num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return out, own


def down(
    inner: torch.Tensor,
    own: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    shared: SharedExpert,
    *,
    block: int = 0,
    at_once: int = 0,
    warps: int = 0,
    pdl: bool = True,
) -> torch.Tensor:
    """From `gate_up`'s results on; see `mixture`. `chosen` must be older than the kernel in front."""
    num_rows, top_k = chosen.shape
    hidden, packed = experts.down.shape[1], experts.factors is not None
    cut = (8, 2, 4) if not packed else (16, 8, 4) if num_rows == 1 else (32, 2, 8)
    block, at_once, warps = block or cut[0], at_once or cut[1], warps or cut[2]
    out = torch.empty(num_rows, hidden, dtype=torch.bfloat16, device=inner.device)
    num_units = experts.inner // (2 * UNIT_BYTES if packed else UNIT_BYTES // 2)
    _down[(triton.cdiv(hidden, block), num_rows)](
        inner, chosen, weights, experts.down, _or(experts.down_scale, inner), _or(experts.factors, inner),
        own, shared.down, out,
        experts.inner, hidden, shared.down.shape[1], top_k, min(at_once, top_k), block, min(32, num_units),
        packed, pdl, warps, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    return out


def large_mixture(
    x: torch.Tensor,
    chosen: torch.Tensor,
    weights: torch.Tensor,
    experts: Experts,
    shared: SharedExpert,
) -> torch.Tensor:
    """As `mixture`, for many tokens: those of each expert together. x bfloat16."""
    gate_up_plan, down_plan = triton_grouped.plans(chosen.numel(), len(experts.gate_up))
    who = triton_members.members(chosen, len(experts.gate_up), (gate_up_plan.size, down_plan.size))
    if experts.factors is not None:
        inner = triton_grouped.gate_up(x.half(), who, who.tiles[0], experts, gate_up_plan)
        parts = triton_grouped.down(inner, who.tiles[1], experts, down_plan)
    else:
        inner = torch._grouped_mm(x[who.order // chosen.shape[1]], experts.gate_up.transpose(1, 2), offs=who.ends)
        parts = torch._grouped_mm(triton_dense.silu_mul(inner), experts.down.transpose(1, 2), offs=who.ends)
    own = F.linear(triton_dense.silu_mul(F.linear(x, shared.gate_up)), shared.down)
    return triton_mixture.add_up(parts, who.places, weights, own)


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor
