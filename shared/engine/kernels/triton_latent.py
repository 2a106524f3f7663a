"""Latent attention over a selection (MLA with DSA) on a GPU, in Triton. The twin is `sparse_reference`.

Rows and slots are those of `inputs.Rows`. A row's selection is `counts[row]` slots of `slots[row]`.

Attention is cut into splits of a selection, merged by their log-sum-exp ("Flash-Decoding", Dao et al. 2023). Latents
are the left side of both products, so that heads, which are few on a rank, need to fill no more than 16 columns.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from shared.engine.kernels import cuda_latent
from shared.engine.kernels.cuda_latent import CudaLatent
from shared.engine.kernels.inputs import Queries, Selected
from shared.engine.kernels.splits import Parts
from shared.engine.kernels.triton_early import wait
from shared.engine.kernels.triton_queries import ABSORB_ROWS

HEADS = 16  # of a product at least
MAX_SPLITS = 64
LOG2_E = 1.4426950408889634
TOKENS = 32  # attended to at a time; with 64, Triton 3.6 compiles `_attend_once` to something wrong (docs/LOG.md)
PROGRAMS = 264  # two for each multiprocessor of an H100


@triton.jit
def _page(state, slot, page_stride, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr):
    wide = slot.to(tl.int64)
    return state + (wide // PAGE_SIZE) * page_stride + (wide % PAGE_SIZE) * DIM


@triton.jit
def _attend_once(
    q_latent, q_rope, latents, slots, counts, parts, maxima, sums, page_stride, row_stride, head_stride, scale,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, TOP_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_attend`, for splits of TOKENS. With EARLY the selection, and what the step has written into the pages, are
    older than the kernel in front: latents are read while that still runs."""
    if PDL and not EARLY:
        gdc_launch_dependents()
        wait(q_latent)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    used, at, turned = head < NUM_HEADS, tl.arange(0, LATENT), tl.arange(0, ROPE)
    place = split * TOKENS + tl.arange(0, TOKENS)
    count = tl.load(counts + row, cache_modifier=".cg")
    inside = place < count
    slot = tl.load(slots + row * TOP_K + place, inside, 0, cache_modifier=".cg")
    token = _page(latents, slot, page_stride, PAGE_SIZE, LATENT + ROPE)
    keys = tl.load(token[:, None] + at[None], inside[:, None], 0.0, cache_modifier=".cg")
    key_rope = tl.load(token[:, None] + LATENT + turned[None], inside[:, None], 0.0, cache_modifier=".cg")
    if PDL and EARLY:
        gdc_launch_dependents()
        wait(q_latent)
    out = (row * NUM_HEADS + head) * SPLITS + split
    if split * TOKENS < count:
        queries = tl.load(q_latent + row * row_stride + head[:, None] * head_stride + at[None], used[:, None], 0.0)
        rotary = tl.load(q_rope + (row * NUM_HEADS + head[:, None]) * ROPE + turned[None], used[:, None], 0.0)
        score = tl.dot(keys, tl.trans(queries)) + tl.dot(key_rope, tl.trans(rotary))
        score = tl.where(inside[:, None], score * scale, -float("inf"))
        best = tl.max(score, 0)
        weight = tl.exp2(score - best[None])
        mean = tl.dot(tl.trans(keys), weight.to(keys.dtype))
        tl.store(maxima + out, best, used)
        tl.store(sums + out, tl.sum(weight, 0), used)
        tl.store(parts + out[None] * LATENT + at[:, None], mean, used[None])
    else:
        tl.store(maxima + out, tl.full([HEADS], -float("inf"), tl.float32), used)
        tl.store(sums + out, tl.zeros([HEADS], tl.float32), used)


@triton.jit
def _attend(
    q_latent, q_rope, latents, slots, counts, parts, maxima, sums, page_stride, row_stride, head_stride, scale,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, TOP_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        wait(q_latent)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    used = head < NUM_HEADS
    count = tl.load(counts + row)
    each = tl.cdiv(tl.cdiv(count, SPLITS), TOKENS) * TOKENS
    first, last = split * each, tl.minimum((split + 1) * each, count)
    at, turned = tl.arange(0, LATENT), tl.arange(0, ROPE)
    queries = tl.load(q_latent + row * row_stride + head[:, None] * head_stride + at[None], used[:, None], 0.0)
    rotary = tl.load(q_rope + (row * NUM_HEADS + head[:, None]) * ROPE + turned[None], used[:, None], 0.0)
    best = tl.full([HEADS], -float("inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    mean = tl.zeros([LATENT, HEADS], tl.float32)
    for start in range(first, last, TOKENS):
        place = start + tl.arange(0, TOKENS)
        inside = place < last
        slot = tl.load(slots + row * TOP_K + place, inside, 0)
        token = _page(latents, slot, page_stride, PAGE_SIZE, LATENT + ROPE)
        keys = tl.load(token[:, None] + at[None], inside[:, None], 0.0)
        key_rope = tl.load(token[:, None] + LATENT + turned[None], inside[:, None], 0.0)
        score = tl.dot(keys, tl.trans(queries)) + tl.dot(key_rope, tl.trans(rotary))
        score = tl.where(inside[:, None], score * scale, -float("inf"))
        higher = tl.maximum(best, tl.max(score, 0))
        kept, weight = tl.exp2(best - higher), tl.exp2(score - higher[None])
        total = total * kept + tl.sum(weight, 0)
        mean = mean * kept[None] + tl.dot(tl.trans(keys), weight.to(keys.dtype))
        best = higher
    out = (row * NUM_HEADS + head) * SPLITS + split
    tl.store(maxima + out, best, used)
    tl.store(sums + out, total, used)
    if first < last:
        tl.store(parts + out[None] * LATENT + at[:, None], mean, used[None])


@triton.jit
def _merged(parts, maxima, sums, place, SPLITS: tl.constexpr, LATENT: tl.constexpr, AT_ONCE: tl.constexpr):
    """Of the splits behind `place`: float32 [LATENT]. A split that nothing fell to has no part."""
    best = tl.max(tl.load(maxima + place * SPLITS + tl.arange(0, SPLITS)), 0)
    at, total = tl.arange(0, LATENT), 0.0
    mean = tl.zeros([LATENT], tl.float32)
    for start in tl.static_range(0, SPLITS, AT_ONCE):
        split = place * SPLITS + start + tl.arange(0, AT_ONCE)
        weight = tl.exp2(tl.load(maxima + split) - best)
        total += tl.sum(weight * tl.load(sums + split), 0)
        part = tl.load(parts + split[:, None] * LATENT + at[None], (weight > 0)[:, None], 0.0)
        mean += tl.sum(part * weight[:, None], 0)
    return mean / total


@triton.jit
def _merge(
    parts, maxima, sums, out, row_stride, head_stride,
    NUM_HEADS: tl.constexpr, LATENT: tl.constexpr, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    mean = _merged(parts, maxima, sums, row * NUM_HEADS + head, SPLITS, LATENT, AT_ONCE)
    target = out + row * row_stride + head * head_stride + tl.arange(0, LATENT)
    tl.store(target, mean.to(out.dtype.element_ty))


@triton.jit
def _merge_and_raise(
    parts, maxima, sums, up_value, out,
    NUM_HEADS: tl.constexpr, LATENT: tl.constexpr, VALUE: tl.constexpr, TILE: tl.constexpr, SPLITS: tl.constexpr,
    AT_ONCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(2).to(tl.int64), tl.program_id(0)
    v, c = tl.program_id(1) * TILE + tl.arange(0, TILE), tl.arange(0, LATENT)
    matrix = tl.load(up_value + (head * VALUE + v[:, None]) * LATENT + c[None])
    if PDL:
        gdc_launch_dependents()
        wait(parts)
    mean = _merged(parts, maxima, sums, row * NUM_HEADS + head, SPLITS, LATENT, AT_ONCE)
    mean = mean.to(matrix.dtype).to(tl.float32)
    raised = tl.sum(matrix.to(tl.float32) * mean[None], 1)
    tl.store(out + (row * NUM_HEADS + head) * VALUE + v, raised.to(out.dtype.element_ty))


def attend(
    queries: Queries,
    latents: torch.Tensor,
    selected: Selected,
    up_value: torch.Tensor,
    scale: float,
    kernels: CudaLatent | None = None,
    *,
    early: bool = False,
    late: bool = False,
    pdl: bool = True,
) -> torch.Tensor:
    """Attend to the selection; [T, H * v]. `up_value` [H, v, latent] brings what was found out of latent space.

    `early`: selection and latents are older than the kernel launched last, which made the queries. `kernels` serve few
    rows, if they are made for such heads; `late` as in `CudaLatent.merge`.
    """
    own = kernels if cuda_latent.suits(queries, latents, up_value) else None
    if own is not None and len(selected.slots) <= cuda_latent.MOST_ROWS:
        parts = own.attend(queries, latents, selected, scale, early=early, pdl=pdl)
    else:
        parts = attend_in_parts(queries, latents, selected, scale, early=early, pdl=pdl)
    few = own if len(selected.slots) <= ABSORB_ROWS else None
    return few.merge(parts, up_value, late=late, pdl=pdl) if few else merge(parts, up_value, pdl=pdl)


def attend_in_parts(
    queries: Queries,
    latents: torch.Tensor,
    selected: Selected,
    scale: float,
    *,
    splits: int = 0,
    tokens: int = 0,
    warps: int = 4,
    stages: int = 2,
    early: bool = False,
    pdl: bool = True,
) -> Parts:
    """Each split of the selection by itself."""
    num_rows, heads, latent = queries.latent.shape
    splits = splits or num_splits(num_rows, triton.cdiv(heads, HEADS))
    each = selected.slots.shape[1] // splits
    tokens = tokens or max(16, min(TOKENS, each))
    means = torch.empty(num_rows, heads, splits, latent, dtype=torch.float32, device=latents.device)
    maxima, sums = (torch.empty(num_rows, heads, splits, dtype=torch.float32, device=latents.device) for _ in range(2))
    once = splits * tokens >= selected.slots.shape[1]
    kernel, how = (_attend_once, (early, pdl)) if once else (_attend, (pdl,))
    kernel[(num_rows, triton.cdiv(heads, HEADS), splits)](
        queries.latent, queries.rope, latents, selected.slots, selected.counts, means, maxima, sums,
        latents.stride(0), queries.latent.stride(0), queries.latent.stride(1), scale * LOG2_E,
        heads, HEADS, latent, queries.rope.shape[2], selected.slots.shape[1], latents.shape[1], splits, tokens, *how,
        num_warps=warps, num_stages=stages, launch_pdl=pdl,
    )  # fmt: skip
    return Parts(means, maxima, sums)


def merge(parts: Parts, up_value: torch.Tensor, *, tile: int = 32, warps: int = 4, pdl: bool = True) -> torch.Tensor:
    """Out of latent space: [T, H * v]."""
    num_rows, heads, splits, latent = parts.means.shape
    found = parts.means, parts.maxima, parts.sums
    value, at_once = up_value.shape[1], min(8, splits)
    if num_rows <= ABSORB_ROWS:
        out = up_value.new_empty(num_rows, heads * value)
        _merge_and_raise[(heads, value // tile, num_rows)](
            *found, up_value, out, heads, latent, value, tile, splits, at_once, pdl, num_warps=warps, launch_pdl=pdl
        )  # fmt: skip
        return out
    mean = up_value.new_empty(heads, num_rows, latent)
    _merge[(num_rows, heads)](*found, mean, mean.stride(1), mean.stride(0), heads, latent, splits, at_once, num_warps=4)
    return torch.bmm(mean, up_value.transpose(1, 2)).transpose(0, 1).reshape(num_rows, heads * value)


def num_splits(num_rows: int, num_blocks: int) -> int:
    """How many splits fill the GPU: a power of two."""
    wanted = PROGRAMS // (num_rows * num_blocks)
    return int(min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1)))
