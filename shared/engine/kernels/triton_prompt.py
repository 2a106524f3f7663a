"""Latent attention of a prompt's many rows, in Triton: keys and values are made of latents once, and rows attend to all
that they see, or to what of it was selected.

A few rows attend in latent space, each to its own selection (`triton_latent`). Many rows of one sequence see much the
same: a head's keys and values cost less to make than what they save, since heads are half as wide as latents, and no
row looks up its own. Of a selection a bit for each token says whether it is one of them. What is not selected is
computed for nothing, so this is for contexts of a few times `top_k` tokens. The twin is `sparse_reference`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from shared.engine.kernels.inputs import Selected, Span

ROWS, KEYS = 128, 64
MAKING, FASTER = 23, 13  # a token's keys and values; a pair of them that is selected, or not
LOG2_E = 1.4426950408889634
BITS = tl.constexpr(32)


@dataclass(frozen=True, slots=True)
class Context:
    """Of one sequence, by position: what every head's keys begin with [C, H, nope], how they all end [C, rope], whose
    rows may be strided, and values [C, H, v]."""

    nope: torch.Tensor
    rope: torch.Tensor
    values: torch.Tensor


@triton.jit(do_not_specialize=["num_tokens"])
def _gather(latents, pages, out, page_stride, num_tokens, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr,
            BLOCK: tl.constexpr, TOKENS: tl.constexpr):  # fmt: skip
    position = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = position < num_tokens
    page = tl.load(pages + position // PAGE_SIZE, inside, 0).to(tl.int64)
    at = tl.arange(0, BLOCK)[None, :]
    both = inside[:, None] & (at < DIM)
    row = tl.load(latents + page[:, None] * page_stride + (position % PAGE_SIZE)[:, None] * DIM + at, both, 0.0)
    tl.store(out + position.to(tl.int64)[:, None] * DIM + at, row, both)


@triton.jit(do_not_specialize=["num_words"])
def _mark(slots, counts, places, bits, num_words, TOP_K: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """The bits of a row's selection."""
    row, at = tl.program_id(0).to(tl.int64), tl.arange(0, TOP_K)
    inside = at < tl.load(counts + row)
    slot = tl.load(slots + row * TOP_K + at, inside, 0)
    position = tl.load(places + slot // PAGE_SIZE, inside, 0) * PAGE_SIZE + slot % PAGE_SIZE
    tl.atomic_or(bits + row * num_words + position // BITS, 1 << (position % BITS), inside, sem="relaxed")


@triton.jit
def _scored(q, q_rest, q_rope, k, k_rest, k_rope, REST: tl.constexpr):
    score = tl.dot(q, tl.trans(k))
    if REST:
        score = tl.dot(q_rest, tl.trans(k_rest), score)
    return tl.dot(q_rope, tl.trans(k_rope), score)


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "num_words"])
def _attend(
    q, q_rope, nope, rope, values, positions, bits, out, q_stride, rope_stride, num_rows, num_tokens,
    num_words, scale,
    NUM_HEADS: tl.constexpr, FIRST: tl.constexpr, REST: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, MARKED: tl.constexpr,
):  # fmt: skip
    """Rows of one head. A head's keys are FIRST and REST (a power of two each, or no rest) and ROPE wide."""
    head = tl.program_id(1)
    NOPE: tl.constexpr = FIRST + REST
    begin = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # those that see most come first
    r = begin + tl.arange(0, ROWS)
    used, row = r < num_rows, tl.minimum(r, num_rows - 1).to(tl.int64)
    position = tl.load(positions + row)
    a, b, c, v = tl.arange(0, FIRST), tl.arange(0, REST if REST else 16), tl.arange(0, ROPE), tl.arange(0, VALUE)
    queries = q + row[:, None] * q_stride + head * (NOPE + ROPE)
    first = tl.load(queries + a[None, :])
    rest = tl.load(queries + FIRST + b[None, :]) if REST else first
    turned = tl.load(q_rope + (row[:, None] * NUM_HEADS + head) * ROPE + c[None, :])
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, VALUE], tl.float32)
    least, most = tl.load(positions + begin), tl.load(positions + tl.minimum(begin + ROWS, num_rows) - 1)
    for start in range(0, most + 1, KEYS):
        at = start + tl.arange(0, KEYS)
        inside, n = at < num_tokens, at.to(tl.int64)
        own = nope + (n[:, None] * NUM_HEADS + head) * NOPE
        k = tl.load(own + a[None, :], inside[:, None], 0.0)
        k_rest = tl.load(own + FIRST + b[None, :], inside[:, None], 0.0) if REST else k
        k_rope = tl.load(rope + n[:, None] * rope_stride + c[None, :], inside[:, None], 0.0)
        score = _scored(first, rest, turned, k, k_rest, k_rope, REST) * scale
        if MARKED:
            low = tl.load(bits + row * num_words + start // BITS)
            high = tl.load(bits + row * num_words + start // BITS + 1)
            word = tl.where((at % KEYS < BITS)[None, :], low[:, None], high[:, None])
            seen = (word >> (at % BITS)[None, :]) & 1
            score = tl.where(seen != 0, score, -float("inf"))
        elif start + KEYS > least:
            score = tl.where(at[None, :] <= position[:, None], score, -float("inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        shift = tl.where(higher > -float("inf"), higher, 0.0)
        kept, weight = tl.exp2(best - shift), tl.exp2(score - shift[:, None])
        total = total * kept + tl.sum(weight, 1)
        value = tl.load(values + (n[:, None] * NUM_HEADS + head) * VALUE + v[None, :], inside[:, None], 0.0)
        mean = tl.dot(weight.to(value.dtype), value, mean * kept[:, None])
        best = higher
    mean = mean / total[:, None]
    target = out + (row[:, None] * NUM_HEADS + head) * VALUE + v[None, :]
    tl.store(target, mean.to(out.dtype.element_ty), used[:, None])


def context(latents: torch.Tensor, span: Span, up_key: torch.Tensor, up_value: torch.Tensor) -> Context:
    """Of what a sequence has in its pages. latents [pages, page_size, latent + rope], one layer's view of the pool;
    up_key [H, nope, latent]; up_value [H, v, latent]."""
    (heads, nope, latent), value, dim = up_key.shape, up_value.shape[1], latents.shape[2]
    found = latents.new_empty(span.context, dim)
    _gather[(triton.cdiv(span.context, 8),)](
        latents,
        span.pages,
        found,
        latents.stride(0),
        span.context,
        latents.shape[1],
        dim,
        triton.next_power_of_2(dim),
        8,
    )
    plain, rope = found[:, :latent], found[:, latent:]
    return Context(
        F.linear(plain, up_key.view(heads * nope, latent)).view(-1, heads, nope),
        rope,
        F.linear(plain, up_value.view(heads * value, latent)).view(-1, heads, value),
    )


def pays(num_rows: int, context: int, heads: int, top_k: int) -> bool:
    """Whether rows that see up to so many tokens should attend together. What it takes is counted in pairs of a row and
    a token that attend in latent space, up to 16 heads at once, as measured (docs/LOG.md)."""
    pairs, groups = num_rows * (context - num_rows / 2), -(-heads // 16)
    return (MAKING * context + pairs / FASTER) * heads / 8 < num_rows * min(context, top_k) * groups


def spanned(span: Span, num_pages: int, heads: int, top_k: int) -> Span:
    """Attended together, in a pool of so many pages, where that pays; with room for marks where there is a choice."""
    if not pays(span.last - span.first, span.context, heads, top_k):
        return span
    if span.context <= top_k:
        return replace(span, attended_together=True)
    places = torch.empty(num_pages, dtype=torch.int32, device=span.pages.device)
    places[span.pages.long()] = torch.arange(len(span.pages), dtype=torch.int32, device=span.pages.device)
    num_words = triton.cdiv(span.context, KEYS) * (KEYS // 32)
    bits = torch.empty(span.last - span.first, num_words, dtype=torch.int32, device=span.pages.device)
    return replace(span, attended_together=True, places=places, bits=bits)


def mark(span: Span, selected: Selected, page_size: int) -> None:
    """Write the bits of a span: bit p of a row, of words of 32, is set for each position p that it has selected."""
    if span.bits is None or span.places is None:
        return
    span.bits.zero_()
    _mark[(len(span.bits),)](
        selected.slots, selected.counts, span.places, span.bits, span.bits.shape[1], selected.slots.shape[1], page_size,
        num_warps=8,
    )  # fmt: skip


def attend(
    q: torch.Tensor,
    q_rope: torch.Tensor,
    seen: Context,
    positions: torch.Tensor,
    bits: torch.Tensor | None,
    scale: float,
    *,
    rows: int = ROWS,
    keys: int = KEYS,
    warps: int = 8,
    stages: int = 2,
) -> torch.Tensor:
    """[T, H * v]. q [T, ...], of which the heads come first [H, nope + rope], rows may be strided; q_rope [T, H, rope],
    turned; positions int32 [T], each one more than the one before. `bits` as `mark` writes them, or None: rows attend
    to all that they see."""
    (num_rows, heads, rope), (num_tokens, _, nope), value = q_rope.shape, seen.nope.shape, seen.values.shape[2]
    first = 1 << (nope.bit_length() - 1)
    out = seen.values.new_empty(num_rows, heads * value)
    _attend[(triton.cdiv(num_rows, rows), heads)](
        q, q_rope, seen.nope, seen.rope, seen.values, positions, positions if bits is None else bits, out,
        q.stride(0), seen.rope.stride(0), num_rows, num_tokens, 0 if bits is None else bits.shape[1], scale * LOG2_E,
        heads, first, nope - first, rope, value, rows, keys, bits is not None, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def suits(nope: int) -> bool:
    """Whether so much of a head without position is one power of two, or two."""
    rest = nope - (1 << (nope.bit_length() - 1))
    return not rest & (rest - 1) and (rest == 0 or rest >= 16)
