"""The chosen experts of few tokens, at the speed of reading them; weights in NVFP4 or bfloat16.

Two kernels: the inner values of every chosen expert, silu(gate) * up; and their way down, weighted and summed in the
order of the choice together with the shared expert. Each choice is computed on its own: few tokens seldom choose the
same expert, and where they do its weights come from the cache. What an FP4 code stands for has a mantissa of one bit,
so the upper byte of an fp16 holds it, and a permutation of bytes looks four of them up at once. The twin is
`layers.moe.Moe`.
"""

import torch
import torch.nn.functional as F
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from shared.engine.kernels import triton_dense
from shared.engine.kernels.experts import Experts, SharedExpert, plain_down, plain_gate_up
from shared.engine.kernels.gluon_rows import begin, begin_in_turn
from shared.errors import Unsupported

MAX_TOKENS = 64
# Where codes multiply them, inner values are kept as fp16 times SMALLER, and sums of sixteen products are fp16 too.
SMALLER, LARGEST = gl.constexpr(1 / 64), gl.constexpr(10_000.0)
MOST = 10_000.0  # what activations may be for these sums to be no larger than an fp16
UNIT_BYTES = 16  # what a thread loads at once: 32 codes or 8 bfloat16


@gluon.jit
def _decode(codes):
    """uint8 [..., 16] -> the first and the second codes of `words` as fp16 [..., 16], times 2^-4."""
    return gl.inline_asm_elementwise(
        """
        {
        .reg .b32 m, a, b, s;
        and.b32 m, $4, 0x77777777;
        prmt.b32 a, 0x2E2C2800, 0x36343230, m;
        shr.b32 m, m, 16;
        prmt.b32 b, 0x2E2C2800, 0x36343230, m;
        lop3.b32 a, $4, 0x80808080, a, 0xEA;
        shl.b32 s, $4, 4;
        lop3.b32 b, s, 0x80808080, b, 0xEA;
        prmt.b32 $0, a, 0, 0x1404;
        prmt.b32 $1, a, 0, 0x3424;
        prmt.b32 $2, b, 0, 0x1404;
        prmt.b32 $3, b, 0, 0x3424;
        }
        """,
        "=r,=r,=r,=r,r",
        [codes],
        dtype=(gl.float16, gl.float16),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _times(a, b):
    return gl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _plus(a, b, c):
    """a b + c."""
    return gl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _sum(a, b):
    return gl.inline_asm_elementwise(
        "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _halves(x):
    """The first and the second half of the last dimension, of three or four."""
    if len(x.shape) == 3:
        parts = gl.permute(gl.reshape(x, [x.shape[0], x.shape[1], 2, x.shape[2] // 2]), (0, 1, 3, 2))
    else:
        parts = gl.reshape(x, [x.shape[0], x.shape[1], x.shape[2], 2, x.shape[3] // 2])
        parts = gl.permute(parts, (0, 1, 2, 4, 3))
    return gl.split(parts)


@gluon.jit
def _dots(codes, x, layout: gl.constexpr):
    """Sums over the last dimension, of 16, of products of codes with fp16, two at a time: to float32. `layout` is that
    of the sums."""
    codes, x = gl.broadcast(codes, x)
    c, d = _halves(codes)
    y, z = _halves(x)
    c0, c1 = _halves(c)
    y0, y1 = _halves(y)
    d0, d1 = _halves(d)
    z0, z1 = _halves(z)
    near, far = _halves(_plus(d1, z1, _plus(d0, z0, _plus(c1, y1, _times(c0, y0)))))
    total = _sum(near, far)
    return gl.convert_layout(gl.sum(total.to(gl.float32), len(codes.shape) - 1), layout)


@gluon.jit
def _scale(bits):
    """e4m3 without a sign, as uint8, to float32: the value times 2^-8."""
    return (bits.to(gl.int16) << 7).to(gl.float16, bitcast=True).to(gl.float32)


@gluon.jit
def _packed_sums(source, weight, scale, row, K: gl.constexpr, UNITS: gl.constexpr, layout: gl.constexpr):
    """Rows `row` of packed weights times one row of x, of which a thread has units of 16 at `source`: by unit."""
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]
    each = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, :][:, None, :]
    place = weight + row[:, None][:, :, None] * (K // 2) + unit[:, :, None] * 16 + each
    scales = scale + row[:, None] * (K // 16) + unit
    of_sums: gl.constexpr = gl.SliceLayout(2, layout)
    sums = gl.zeros([row.shape[0], UNITS], gl.float32, of_sums)
    ahead, low_ahead, high_ahead = gl.load(place), gl.load(scales), gl.load(scales + K // 32)
    for start in gl.static_range(0, K // 32, UNITS):
        codes, low_scale, high_scale = ahead, _scale(low_ahead), _scale(high_ahead)
        if start + UNITS < K // 32:
            ahead = gl.load(place + (start + UNITS) * 16)
            low_ahead = gl.load(scales + (start + UNITS))
            high_ahead = gl.load(scales + (start + UNITS + K // 32))
        low, high = _decode(codes)
        sums += _dots(low, gl.expand_dims(gl.load(source + start * 16), 0), of_sums) * low_scale
        sums += _dots(high, gl.expand_dims(gl.load(source + (start * 16 + K // 2)), 0), of_sums) * high_scale
    return sums


@gluon.jit
def _plain_sums(source, weight, row, K: gl.constexpr, UNITS: gl.constexpr, layout: gl.constexpr, PDL: gl.constexpr):
    """As `_packed_sums`, of bfloat16 weights in units of 8. With PDL it waits for x itself, having begun on them."""
    unit = gl.arange(0, UNITS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))[None, :]
    each = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, layout)))[None, :][:, None, :]
    place = weight + row[:, None][:, :, None] * K + unit[:, :, None] * 8 + each
    sums = gl.zeros([row.shape[0], UNITS], gl.float32, gl.SliceLayout(2, layout))
    ahead = gl.load(place)
    begin_in_turn(weight, PDL)
    for start in gl.static_range(0, K // 8, UNITS):
        w = ahead.to(gl.float32)
        if start + UNITS < K // 8:
            ahead = gl.load(place + (start + UNITS) * 8)
        value = gl.load(source + start * 8).to(gl.float32)
        sums += gl.sum(w * gl.expand_dims(value, 0), 2)
    return sums


@gluon.jit
def _fetch(weight, first, K: gl.constexpr, SKIP: gl.constexpr, ROWS: gl.constexpr, WARPS: gl.constexpr):
    """Ask for ROWS rows of K values from `first` on, but for the SKIP first of each, to be brought into the L2 cache;
    nobody waits for it."""
    THREADS_OF_ROW: gl.constexpr = WARPS * 32 // ROWS
    EACH: gl.constexpr = (K - SKIP) // THREADS_OF_ROW
    thread = gl.arange(0, WARPS * 32, gl.BlockedLayout([1], [32], [WARPS], [0]))
    row = (first + thread // THREADS_OF_ROW).to(gl.int64)
    address = (weight + row * K + SKIP + (thread % THREADS_OF_ROW) * EACH).to(gl.int64)
    gl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [address, thread * 0 + EACH * 2],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


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
            sums = _packed_sums(source, weight, scale, row, K, UNITS, layout)
            result = _gated(sums, gl.load(factors + expert * 2) * 16, BLOCK, flat) * SMALLER
            result = gl.minimum(gl.maximum(result, -LARGEST), LARGEST)
        else:
            result = _gated(_plain_sums(source, weight, row, K, UNITS, layout, False), 1.0, BLOCK, flat)
        gl.store(out + choice * INNER + at, result.to(out.dtype.element_ty))
    elif gl.program_id(1) * BLOCK < SHARED:
        of_plain: gl.constexpr = gl.SliceLayout(0, plain)
        r2 = gl.arange(0, 2 * BLOCK, gl.SliceLayout(1, gl.SliceLayout(2, plain)))
        own = x + (choice - num_choices) * K + gl.arange(0, UNITS, gl.SliceLayout(1, of_plain))[:, None] * 8
        own += gl.arange(0, 8, gl.SliceLayout(0, of_plain))[None, :]
        own_row = gl.program_id(1) * BLOCK + r2 // 2 + (r2 % 2) * SHARED
        if FETCH:  # beyond what is loaded at once: the routed experts must wait for the choice, this needs not
            _fetch(shared_weight, gl.program_id(1) * BLOCK, K, UNITS * 8, BLOCK, WARPS)
            _fetch(shared_weight, SHARED + gl.program_id(1) * BLOCK, K, UNITS * 8, BLOCK, WARPS)
        own_sums = _plain_sums(own, shared_weight, own_row, K, UNITS, plain, PDL)
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
            low, high = _decode(w)
            sums = _dots(low, act, of_sums) * _scale(low_scale)
            sums += _dots(high, gl.expand_dims(gl.load(source + K // 2), 1), of_sums) * _scale(high_scale)
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
    warps: int = 2,
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
    warps = min(warps, max(1, (num_units & -num_units) // 32))
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
    alone = (16, 8, 4) if packed and num_rows == 1 else (32, 2, 8)
    block, at_once, warps = block or alone[0], at_once or alone[1], warps or alone[2]
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
    """As `mixture`, for many tokens: those of each expert together, as one grouped product."""
    num_rows, top_k = chosen.shape
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=len(experts.gate_up)).cumsum(0).int()
    inner = torch._grouped_mm(x[order // top_k], plain_gate_up(experts).transpose(1, 2), offs=ends)
    parts = torch._grouped_mm(triton_dense.silu_mul(inner), plain_down(experts).transpose(1, 2), offs=ends)
    own = torch.empty_like(parts)
    own[order] = parts
    total = F.linear(triton_dense.silu_mul(F.linear(x, shared.gate_up)), shared.down).float()
    total += (own.view(num_rows, top_k, -1).float() * weights[..., None]).sum(1)
    return total.to(x.dtype)


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor
