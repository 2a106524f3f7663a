"""Attention of few queries over pages: decode and verification, in Triton, with nothing for the host to plan.

Each sequence's context is cut into splits that are attended to side by side ("Flash-Decoding", Dao et al. 2023); the
last of them to end merges all by their log-sum-exp, in the order of splits. How many there are depends on the size of
the batch alone, so that a captured graph fits every context; a split that a short context has no use for ends at once
and is not waited for. The twin is `reference.paged_attention`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.kernels.triton_dense import launch_options

TOKENS = 64  # of a context at a time
MIN_ROWS = 16  # of a matrix product
MAX_SPLITS = 32
MERGED_ROWS = 32  # rows times splits whose values a block has in registers at once
MERGED_TOGETHER = 8  # loads of so many values that wait together; to compile more of them in a row takes seconds
BLOCKS_PER_GPU = 264  # two for each multiprocessor of an H100


@triton.jit
def _attend(
    q, kv, page_ids, page_starts, context_lens, out, parts, maxima, sums, num_done,
    page_stride, kind_stride, head_stride, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, USED: tl.constexpr, D: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr, NUM: tl.constexpr, TOGETHER: tl.constexpr, TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    # No kernel of a step writes these, so they are loaded before the one before has ended.
    length = tl.load(context_lens + sequence, cache_modifier=".cg")
    table = page_ids + tl.load(page_starts + sequence, cache_modifier=".cg")
    each = tl.cdiv(tl.cdiv(length, SPLITS), TOKENS) * TOKENS
    first, last = split * each, tl.minimum((split + 1) * each, length)
    if first >= length:
        return  # the first split never does, so that this kernel ends after the one before
    if PDL:
        gdc_wait()
    rows, at = tl.arange(0, ROWS), tl.arange(0, D)
    used = rows < WIDTH * GROUP
    query = sequence * WIDTH + rows // GROUP
    source = q + (query[:, None] * num_heads * GROUP + head * GROUP + (rows % GROUP)[:, None]) * D + at[None]
    queries = tl.load(source, used[:, None], 0.0, cache_modifier=".cg")  # L1 may hold what was there before
    limit = length - WIDTH + rows // GROUP  # the last position that a row attends to: its own
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, D], tl.float32)
    for start in range(first, last, TOKENS):
        position = start + tl.arange(0, TOKENS)
        inside = position < last
        page = tl.load(table + position // PAGE_SIZE, inside, 0).to(tl.int64)
        token = kv + page * page_stride + head * head_stride + (position % PAGE_SIZE) * D
        keys = tl.load(token[:, None] + at[None], inside[:, None], 0.0)
        score = tl.dot(queries, tl.trans(keys)) * scale
        score = tl.where(inside[None] & (position[None] <= limit[:, None]), score, -float("inf"))
        higher = tl.maximum(best, tl.max(score, 1))
        safe = tl.where(higher == -float("inf"), 0.0, higher)  # a row may see nothing of this split
        kept = tl.exp2(best - safe)
        weight = tl.exp2(score - safe[:, None])
        total = total * kept + tl.sum(weight, 1)
        values = tl.load(token[:, None] + kind_stride + at[None], inside[:, None], 0.0)
        mean = mean * kept[:, None] + tl.dot(weight.to(values.dtype), values)
        best = higher
    head_row = (query * num_heads + head) * GROUP + rows % GROUP
    target = out + head_row[:, None] * D + at[None]
    if SPLITS == 1:
        tl.store(target, (mean / total[:, None]).to(out.dtype.element_ty), used[:, None])
    else:
        own = head_row * SPLITS + split
        tl.store(maxima + own, best, used)
        tl.store(sums + own, total, used)
        tl.store(parts + own[:, None] * D + at[None], mean, used[:, None])
        tl.debug_barrier()  # all of the block has written before it says so
        counter = num_done + sequence * num_heads + head
        num_used = tl.cdiv(length, each)
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == num_used - 1:
            tl.store(counter, 0)
            _merge(
                out, parts, maxima, sums, sequence, head, num_heads, num_used,
                GROUP, WIDTH, USED, D, SPLITS, NUM, TOGETHER,
            )  # fmt: skip


@triton.jit
def _merge(
    out, parts, maxima, sums, sequence, head, num_heads, num_used,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, USED: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr,
    NUM: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Values of NUM splits are loaded at once, and TOGETHER times in a row, so that they wait for memory together. USED
    is a power of two that holds all rows."""
    rows, at, splits = tl.arange(0, USED), tl.arange(0, D), tl.arange(0, SPLITS)
    used = rows < WIDTH * GROUP
    head_row = ((sequence * WIDTH + rows // GROUP) * num_heads + head) * GROUP + rows % GROUP
    place = head_row[:, None] * SPLITS + splits[None]
    there = used[:, None] & (splits < num_used)[None]
    theirs = tl.load(maxima + place, there, -float("inf"), cache_modifier=".cg")
    best = tl.max(theirs, 1)
    safe = tl.where(best == -float("inf"), 0.0, best)
    total = tl.sum(tl.exp2(theirs - safe[:, None]) * tl.load(sums + place, there, 0.0, cache_modifier=".cg"), 1)
    mean = tl.zeros([USED, D], tl.float32)
    some = tl.arange(0, NUM)
    for first in range(0, SPLITS, NUM * TOGETHER):
        for each in tl.static_range(TOGETHER):
            split = first + each * NUM + some
            own, wanted = head_row[:, None] * SPLITS + split[None], used[:, None] & (split < num_used)[None]
            weight = tl.exp2(tl.load(maxima + own, wanted, -float("inf"), cache_modifier=".cg") - safe[:, None])
            source = parts + own[:, :, None] * D + at[None, None]
            part = tl.load(source, wanted[:, :, None], 0.0, cache_modifier=".cg")
            mean += tl.sum(weight[:, :, None] * part, 1)
    target = out + head_row[:, None] * D + at[None]
    tl.store(target, (mean / total[:, None]).to(out.dtype.element_ty), used[:, None])


def num_splits(num_sequences: int, num_kv_heads: int) -> int:
    """How many splits fill the GPU: a power of two."""
    wanted = BLOCKS_PER_GPU // (num_sequences * num_kv_heads)
    return int(min(MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1)))


def counters(num_sequences: int, num_kv_heads: int, device: torch.device) -> torch.Tensor:
    """What `attend` counts its splits with: zeros, before it and after it. Attentions one after the other may share
    them."""
    return torch.zeros(num_sequences * num_kv_heads, dtype=torch.int32, device=device)


def attend(
    q: torch.Tensor,
    kv: torch.Tensor,
    page_ids: torch.Tensor,
    page_starts: torch.Tensor,
    context_lens: torch.Tensor,
    num_done: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of the last tokens of S sequences, equally many of each. q [T, H, D] -> [T, H, D].

    kv [pages, 2, Hkv, page_size, D], one layer's view of the pool; the page table as in `Batch`, int32 on the device;
    `num_done` are `counters`.
    """
    num_sequences, (num_rows, num_heads, head_dim) = len(context_lens), q.shape
    num_kv, page_size = kv.shape[2:4]
    group, width, splits = num_heads // num_kv, num_rows // num_sequences, num_splits(num_sequences, num_kv)
    parts = q.new_empty((num_rows, num_heads, splits, head_dim), dtype=torch.float32)
    maxima, sums = (q.new_empty((num_rows, num_heads, splits), dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(q)
    used = triton.next_power_of_2(group * width)
    num = max(1, min(splits, MERGED_ROWS // used))
    scale = head_dim**-0.5 * 1.4426950408889634  # to base 2
    pdl, options = launch_options(q.device)
    _attend[(num_sequences, num_kv, splits)](
        q, kv, page_ids, page_starts, context_lens, out, parts, maxima, sums, num_done, *kv.stride()[:3], scale,
        group, width, max(MIN_ROWS, used), used, head_dim, page_size,
        splits, num, min(MERGED_TOGETHER, splits // num), TOKENS, pdl,
        num_warps=4, num_stages=3, **options,
    )  # fmt: skip
    return out
