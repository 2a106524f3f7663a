"""Latent attention over a selection (MLA with DSA) on a GPU, in Triton. The twin is `sparse_reference`.

Rows and slots are those of `gluon_rows.Rows`. A row's selection is `counts[row]` slots of `slots[row]`.

Attention is cut into splits of a selection, merged by their log-sum-exp ("Flash-Decoding", Dao et al. 2023). Latents are
the left side of both products, so that heads, which are few on a rank, need to fill no more than 16 columns.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.kernels.gluon_rows import Rows

HEADS = 16  # of a product at least
ABSORB_ROWS = 16
MAX_SPLITS = 64
INDEX_ROLES = 4  # programs that share out the index queries of a row
NUM_FETCHING = 32  # programs that fetch
LINE_BYTES = 128
LOG2_E = 1.4426950408889634
PROGRAMS = 264  # two for each multiprocessor of an H100


@dataclass(frozen=True, slots=True)
class Selected:
    """What each row attends to: slots int32 [T, top_k] in the order of their positions, counts int32 [T]."""

    slots: torch.Tensor
    counts: torch.Tensor


@dataclass(frozen=True, slots=True)
class Dims:
    """Of a rank's attention. Without an indexer `index_heads` is 0."""

    heads: int
    q_lora: int
    latent: int
    nope: int
    rope: int
    index_heads: int
    index_dim: int

    @property
    def head(self) -> int:
        """Of a query head."""
        return self.nope + self.rope


@triton.jit
def _page(state, slot, page_stride, PAGE_SIZE: tl.constexpr, DIM: tl.constexpr):
    wide = slot.to(tl.int64)
    return state + (wide // PAGE_SIZE) * page_stride + (wide % PAGE_SIZE) * DIM


@triton.jit
def fetch(weight, num_lines, program, num_programs, LINES: tl.constexpr):
    """Have lines of 128 bytes brought into the L2 cache; does not wait for them."""
    for start in range(program * LINES, num_lines, num_programs * LINES):
        line = start + tl.arange(0, LINES)
        place = weight.to(tl.int64, bitcast=True) + tl.minimum(line, num_lines - 1).to(tl.int64) * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [place], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _absorb(
    q, up_key, q_latent, q_stride, num_rows, place,
    LATENT: tl.constexpr, NOPE: tl.constexpr, HEAD: tl.constexpr, NUM_HEADS: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Some latent dimensions of one head: the part of its queries without position, times its matrix."""
    head, c = place // (LATENT // TILE), (place % (LATENT // TILE)) * TILE + tl.arange(0, TILE)
    n, row = tl.arange(0, CHUNK), tl.arange(0, ROWS)
    used = (row < num_rows)[:, None]
    matrix = up_key + head * NOPE * LATENT + n[:, None] * LATENT + c[None]
    ahead = tl.load(matrix)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros([ROWS, TILE], tl.float32)
    for start in tl.static_range(0, NOPE, CHUNK):
        w = ahead
        if start + CHUNK < NOPE:
            ahead = tl.load(matrix + (start + CHUNK) * LATENT)
        values = tl.load(q + row[:, None] * q_stride + head * HEAD + start + n[None], used, 0.0).to(w.dtype)
        total += tl.dot(values, w)
    target = q_latent + (row[:, None] * NUM_HEADS + head) * LATENT + c[None]
    tl.store(target, total.to(q_latent.dtype.element_ty), used)


@triton.jit
def _rotate(
    source, target, c, s, source_stride, NUM: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """NUM heads of pairs; c and s [PAIRS]."""
    head, at = tl.arange(0, HEADS)[:, None], tl.arange(0, 2 * PAIRS)[None]
    value = tl.load(source + head * source_stride + at, head < NUM, 0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, [HEADS, PAIRS, 2]))
    turned = tl.join(even * c[None] - odd * s[None], odd * c[None] + even * s[None])
    turned = tl.reshape(turned, [HEADS, 2 * PAIRS]).to(target.dtype.element_ty)
    tl.store(target + head * 2 * PAIRS + at, turned, head < NUM)


@triton.jit
def _prepare(
    q, up_key, cos, sin, q_latent, q_rope, q_index, next_weight, q_stride, num_rows, num_lines,
    LATENT: tl.constexpr, NOPE: tl.constexpr, HALF: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS: tl.constexpr,
    INDEX_HEADS: tl.constexpr, INDEX_DIM: tl.constexpr, NUM_ROLES: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr, NUM_FETCHING: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0) - NUM_FETCHING
    HEAD: tl.constexpr = NOPE + 2 * HALF
    SOME_HEADS: tl.constexpr = INDEX_HEADS // (NUM_ROLES - 1) if INDEX_HEADS > 0 else 1
    if program < 0:
        fetch(next_weight, num_lines, program + NUM_FETCHING, NUM_FETCHING, 128)
    elif program >= num_rows * NUM_ROLES:
        place = program - num_rows * NUM_ROLES
        _absorb(q, up_key, q_latent, q_stride, num_rows, place, LATENT, NOPE, HEAD, NUM_HEADS, ROWS, CHUNK, TILE, PDL)
    else:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        row, role = (program // NUM_ROLES).to(tl.int64), program % NUM_ROLES
        if role == 0:
            pair = tl.arange(0, HALF)
            c, s = tl.load(cos + row * HALF + pair), tl.load(sin + row * HALF + pair)
            target = q_rope + row * NUM_HEADS * 2 * HALF
            _rotate(q + row * q_stride + NOPE, target, c, s, HEAD, NUM_HEADS, HEADS, HALF)
        elif INDEX_HEADS > 0:
            all_pairs = tl.arange(0, INDEX_DIM // 2)  # those behind the first HALF carry no position
            all_c = tl.load(cos + row * HALF + all_pairs, all_pairs < HALF, 1.0)
            all_s = tl.load(sin + row * HALF + all_pairs, all_pairs < HALF, 0.0)
            first = (role - 1) * SOME_HEADS
            source = q + row * q_stride + NUM_HEADS * HEAD + first * INDEX_DIM
            target = q_index + (row * INDEX_HEADS + first) * INDEX_DIM
            _rotate(source, target, all_c, all_s, INDEX_DIM, SOME_HEADS, SOME_HEADS, INDEX_DIM // 2)


@triton.jit
def _attend_once(
    q_latent, q_rope, latents, slots, counts, parts, maxima, sums, page_stride, row_stride, head_stride, scale,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr, TOP_K: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr, TOKENS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `_attend`, for splits of TOKENS. With EARLY the selection, and what the step has written into the pages, are
    older than the kernel in front: latents are read while that still runs."""
    if PDL and not EARLY:
        gdc_wait()
        gdc_launch_dependents()
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
        gdc_wait()
        gdc_launch_dependents()
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
        gdc_wait()
        gdc_launch_dependents()
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
        gdc_wait()
        gdc_launch_dependents()
    mean = _merged(parts, maxima, sums, row * NUM_HEADS + head, SPLITS, LATENT, AT_ONCE)
    mean = mean.to(matrix.dtype).to(tl.float32)
    raised = tl.sum(matrix.to(tl.float32) * mean[None], 1)
    tl.store(out + (row * NUM_HEADS + head) * VALUE + v, raised.to(out.dtype.element_ty))


@dataclass(frozen=True, slots=True)
class Queries:
    """latent [T, H, latent] and rope [T, H, rope] of attention; index [T, index_heads, index_dim] or None."""

    latent: torch.Tensor
    rope: torch.Tensor
    index: torch.Tensor | None


def prepare(
    q: torch.Tensor,
    rows: Rows,
    dims: Dims,
    up_key: torch.Tensor,
    *,
    full: bool,
    next_weight: torch.Tensor | None = None,
    pdl: bool = True,
) -> Queries:
    """Rotate queries and take them into latent space, and where the layer is `full` rotate those of the index.

    q [T, ...]: the heads, and with an index its own; rows may be strided. up_key [H, nope, latent]. `next_weight` is
    brought into the cache meanwhile: what follows is too small to keep the memory busy.
    """
    num_rows, heads = len(q), dims.heads
    new = up_key.new_empty
    made = Queries(
        new(num_rows, heads, dims.latent),
        new(num_rows, heads, dims.rope),
        new(num_rows, dims.index_heads, dims.index_dim) if full else None,
    )
    absorbing, roles, tile = num_rows <= ABSORB_ROWS, 1 + INDEX_ROLES if full else 1, min(64, dims.latent)
    num_programs = num_rows * roles + (heads * (dims.latent // tile) if absorbing else 0)
    fetched = up_key if next_weight is None else next_weight
    fetching = 0 if next_weight is None else NUM_FETCHING
    _prepare[(num_programs + fetching,)](
        q, up_key, rows.cos, rows.sin, made.latent, made.rope, made.latent if made.index is None else made.index,
        fetched, q.stride(0), num_rows, fetched.nbytes // LINE_BYTES,
        dims.latent, dims.nope, dims.rope // 2, heads, triton.next_power_of_2(heads),
        dims.index_heads if full else 0, dims.index_dim if full else 2, roles,
        ABSORB_ROWS, min(64, dims.nope & -dims.nope), tile, pdl, fetching, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    if not absorbing:
        nope = q[:, : heads * dims.head].view(num_rows, heads, dims.head)[..., : dims.nope]
        made.latent.copy_(torch.bmm(nope.transpose(0, 1).to(up_key.dtype), up_key).transpose(0, 1))
    return made


@dataclass(frozen=True, slots=True)
class Parts:
    """What splits found: means float32 [T, H, splits, latent], and for their merging maxima and sums [T, H, splits]."""

    means: torch.Tensor
    maxima: torch.Tensor
    sums: torch.Tensor


def attend(
    queries: Queries, latents: torch.Tensor, selected: Selected, up_value: torch.Tensor, scale: float, *,
    early: bool = False, pdl: bool = True,
) -> torch.Tensor:  # fmt: skip
    """Attend to the selection; [T, H * v]. `up_value` [H, v, latent] brings what was found out of latent space.

    `early`: selection and latents are older than the kernel launched last, which made the queries.
    """
    return merge(attend_in_parts(queries, latents, selected, scale, early=early, pdl=pdl), up_value, pdl=pdl)


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
    tokens = tokens or max(16, min(32, selected.slots.shape[1] // splits))
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
    _merge[(num_rows, heads)](
        *found, mean, mean.stride(1), mean.stride(0), heads, latent, splits, at_once, num_warps=4
    )
    return torch.bmm(mean, up_value.transpose(1, 2)).transpose(0, 1).reshape(num_rows, heads * value)


def num_splits(num_rows: int, num_blocks: int) -> int:
    """How many splits fill the GPU: a power of two."""
    wanted = PROGRAMS // (num_rows * num_blocks)
    return int(min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1)))
