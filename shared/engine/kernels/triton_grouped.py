"""The chosen experts of many tokens, whose weights are codes, in Triton: each is decoded where it is multiplied.

Members (`triton_members`) stand in the order of their experts. A program multiplies some rows of an expert's matrices
by some of its members: rows are the left side of the product, so that tokens, of which an expert may have few, need to
fill no more than 16 columns. Programs of an expert are neighbours, so that what is read again comes from the L2 cache.
Codes become fp16 as `experts.Experts` says, and are multiplied by their scales, exactly. Inner values are fp16 times
SMALLER, as in `gluon_experts`. The twin is `layers.moe.Moe`.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from shared.engine.kernels.experts import FACTOR, Experts
from shared.engine.kernels.triton_members import Members

SMALLER, LARGEST = tl.constexpr(1 / 64), tl.constexpr(65504.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """How products are cut: members of a program, and rows, of gate and of up or of down; its warps; loads ahead; how
    often it takes so many rows of down, at most."""

    size: int
    rows: int
    warps: int
    stages: int
    parts: int = 1


@triton.jit
def _decoded(words, scales, to, PLAIN: tl.constexpr):
    """Words [R, WORDS] at `words`, and the scales of either half, of four words each, at `scales` and `to` behind it:
    fp16 [R, 4 WORDS] of either half of their rows, times 2^-8."""
    word = tl.load(words)
    low, high = tl.load(scales)[:, None], tl.load(scales + to)[:, None]
    at = tl.arange(0, 16)[None, :] // 4
    if PLAIN:
        a, b, c, d, e, f, g, h = _in_triton(word, (low >> (8 * at)) & 0x7F, (high >> (8 * at)) & 0x7F)
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 p, q, x, larger;
            mov.b32 larger, 0x74007400;
            prmt.b32 p, $9, 0, $11;
            prmt.b32 q, $10, 0, $11;
            shl.b32 p, p, 7;
            shl.b32 q, q, 7;
            mul.rn.f16x2 p, p, larger;
            mul.rn.f16x2 q, q, larger;
            and.b32 x, $8, 0x8E008E00;
            mul.rn.f16x2 x, x, p;
            mov.b32 {$0, $1}, x;
            shl.b32 x, $8, 3;
            and.b32 x, x, 0x8E008E00;
            mul.rn.f16x2 x, x, p;
            mov.b32 {$2, $3}, x;
            and.b32 x, $8, 0x40384038;
            mul.lo.u32 x, x, 66;
            and.b32 x, x, 0x8E008E00;
            mul.rn.f16x2 x, x, q;
            mov.b32 {$4, $5}, x;
            and.b32 x, $8, 0x20072007;
            mul.lo.u32 x, x, 516;
            and.b32 x, x, 0x8E008E00;
            mul.rn.f16x2 x, x, q;
            mov.b32 {$6, $7}, x;
            }
            """,
            "=h,=h,=h,=h,=h,=h,=h,=h,r,r,r,r",
            [word, low, high, 0x4040 | at | (at << 8)],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
    return _row(a, b, c, d), _row(e, f, g, h)


@triton.jit
def _in_triton(word, low, high):
    """The same without assembler: bits of fp16 of the eight codes of each word, times their scales."""
    return (
        _product(word >> 9, word, low), _product(word >> 25, word >> 16, low),
        _product(word >> 6, word << 3, low), _product(word >> 22, word >> 13, low),
        _product(word >> 3, word << 1, high), _product(word >> 19, word >> 15, high),
        _product(word, word << 2, high), _product(word >> 16, word >> 14, high),
    )  # fmt: skip


@triton.jit
def _product(magnitude, sign, scale):
    """Lowest three bits of `magnitude`, bit 15 of `sign`, the bits of a scale: fp16 as int16, times 2^-8."""
    # As an fp16 the bits of a magnitude are its value times 2^-14, those of a scale are its value times 2^-8.
    code = (((magnitude & 7) << 9) | (sign & 0x8000)).to(tl.int16).to(tl.float16, bitcast=True)
    wide = (scale << 7).to(tl.int16).to(tl.float16, bitcast=True)
    return ((code.to(tl.float32) * 16384.0) * wide.to(tl.float32)).to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def _row(a, b, c, d):
    """int16 [R, WORDS] four times, neighbours, to fp16 [R, 4 WORDS]."""
    all_four = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(all_four, [a.shape[0], 4 * a.shape[1]]).to(tl.float16, bitcast=True)


@triton.jit
def _gate_up(
    x, order, tiles, words, scales, factors, out,
    K: tl.constexpr, INNER: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, SIZE: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    expert, first, last = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if expert >= 0:
        r, j, k = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, 16), tl.arange(0, 64)
        member = first + tl.arange(0, SIZE)
        inside = member < last
        token = tl.load(order + member, inside, 0) // TOP_K
        source = x + token.to(tl.int64)[:, None] * K + k[None, :]
        row = expert * 2 * INNER + r
        gate_words, gate_scales = words + row[:, None] * (K // 8) + j[None, :], scales + row * (K // 64)
        up_words, up_scales = gate_words + INNER * (K // 8), gate_scales + INNER * (K // 64)
        gate = tl.zeros([ROWS, SIZE], tl.float32)
        up = tl.zeros([ROWS, SIZE], tl.float32)
        for turn in range(0, K // 128):
            near = tl.trans(tl.load(source + turn * 64))
            far = tl.trans(tl.load(source + turn * 64 + K // 2))
            low, high = _decoded(gate_words + turn * 16, gate_scales + turn, K // 128, PLAIN)
            gate = tl.dot(low, near, gate)
            gate = tl.dot(high, far, gate)
            low, high = _decoded(up_words + turn * 16, up_scales + turn, K // 128, PLAIN)
            up = tl.dot(low, near, up)
            up = tl.dot(high, far, up)
        factor = tl.load(factors + expert * 2)
        gate, up = gate * factor, up * factor
        inner = gate * tl.sigmoid(gate) * up * SMALLER
        inner = tl.minimum(tl.maximum(inner, -LARGEST), LARGEST).to(tl.float16)
        tl.store(out + member.to(tl.int64)[None, :] * INNER + r[:, None], inner, inside[None, :])


@triton.jit
def _down(
    inner, tiles, words, scales, factors, out,
    INNER: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """PARTS times ROWS of an expert's rows, so that the next are asked for while some are multiplied."""
    tile = tiles + tl.program_id(0) * 3
    expert, first, last = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if expert >= 0:
        j, k = tl.arange(0, 16), tl.arange(0, 64)
        member = first + tl.arange(0, SIZE)
        inside = member < last
        source = inner + member.to(tl.int64)[:, None] * INNER + k[None, :]
        factor = tl.load(factors + expert * 2 + 1) / SMALLER
        for part in range(0, PARTS):
            r = (tl.program_id(1) * PARTS + part) * ROWS + tl.arange(0, ROWS)
            row = expert * HIDDEN + r
            all_words, all_scales = words + row[:, None] * (INNER // 8) + j[None, :], scales + row * (INNER // 64)
            total = tl.zeros([ROWS, SIZE], tl.float32)
            for turn in tl.static_range(0, INNER // 128):
                near = tl.trans(tl.load(source + turn * 64, inside[:, None], 0.0))
                far = tl.trans(tl.load(source + turn * 64 + INNER // 2, inside[:, None], 0.0))
                low, high = _decoded(all_words + turn * 16, all_scales + turn, INNER // 128, PLAIN)
                total = tl.dot(low, near, total)
                total = tl.dot(high, far, total)
            target = out + member.to(tl.int64)[None, :] * HIDDEN + r[:, None]
            tl.store(target, (total * factor).to(out.dtype.element_ty), inside[None, :])


def gate_up(x: torch.Tensor, who: Members, tiles: torch.Tensor, experts: Experts, plan: Plan) -> torch.Tensor:
    """silu(gate) * up of every member, fp16 [M, I], times SMALLER. x fp16 [T, hidden]; `tiles` of the plan's size."""
    assert experts.gate_up_scale is not None
    assert experts.factors is not None
    out = torch.empty(len(who.order), experts.inner, dtype=torch.float16, device=x.device)
    _gate_up[(len(tiles), experts.inner // plan.rows)](
        x, who.order, tiles, experts.gate_up.view(torch.int32), experts.gate_up_scale.view(torch.int32),
        experts.factors, out, x.shape[1], experts.inner, who.places.shape[1], plan.rows, plan.size, _interpreted(),
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out


def down(inner: torch.Tensor, tiles: torch.Tensor, experts: Experts, plan: Plan) -> torch.Tensor:
    """What comes of `gate_up`'s result for every member, bfloat16 [M, hidden], not weighted yet."""
    assert experts.down_scale is not None
    assert experts.factors is not None
    hidden = experts.down.shape[1]
    out = torch.empty(len(inner), hidden, dtype=torch.bfloat16, device=inner.device)
    parts = math.gcd(plan.parts, hidden // plan.rows)
    _down[(len(tiles), hidden // plan.rows // parts)](
        inner, tiles, experts.down.view(torch.int32), experts.down_scale.view(torch.int32), experts.factors, out,
        experts.inner, hidden, plan.rows, parts, plan.size, _interpreted(),
        num_warps=plan.warps, num_stages=plan.stages,
    )  # fmt: skip
    return out


def _interpreted() -> bool:
    """Whether kernels are interpreted, by what knows no assembler."""
    return not isinstance(_down, JITFunction)


def plans(num_members: int, num_experts: int) -> tuple[Plan, Plan]:
    """Of `gate_up` and of `down`: what was fastest (docs/LOG.md), by how many members an expert has in the mean. Loads
    ahead leave room for fewer programs, which is slower but for the smallest."""
    each = num_members // num_experts
    if each < 12:
        return Plan(16, 64, 4, 3), Plan(16, 128, 4, 2)
    if each < 24:
        return Plan(32, 64, 4, 2), Plan(32, 128, 4, 3)
    gate_up_plan = Plan(32 if each < 48 else 128, 64, 4, 1)
    return gate_up_plan, Plan(64, 128, 4, 1) if each < 96 else Plan(64, 128, 8, 1, 12)


assert FACTOR == 2.0**8, "what is decoded here is smaller by it"
