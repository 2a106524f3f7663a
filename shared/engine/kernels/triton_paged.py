"""Attention of few queries over pages: decode and verification, in Triton, with nothing for the host to plan.

Each sequence's context is cut into splits that are attended to side by side ("Flash-Decoding", Dao et al. 2023); the
last of them to end merges all by their log-sum-exp, in the order of splits. How many there are depends on the size of
the batch alone, so that a captured graph fits every context; a split that a short context has no use for ends at once.
The twin is `reference.paged_attention`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.kernels.triton_dense import launch_options

TOKENS = 64  # of a context at a time
MIN_ROWS = 16  # of a matrix product
MAX_SPLITS = 32
BLOCKS_PER_GPU = 264  # two for each multiprocessor of an H100


@triton.jit
def _attend(
    q, kv, page_ids, page_starts, context_lens, out, parts, maxima, sums, num_done,
    page_stride, kind_stride, head_stride, scale,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, PAGE_SIZE: tl.constexpr,
    SPLITS: tl.constexpr, TOKENS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    sequence, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_heads = tl.num_programs(1)
    length = tl.load(context_lens + sequence)
    each = tl.cdiv(tl.cdiv(length, SPLITS), TOKENS) * TOKENS
    first, last = split * each, tl.minimum((split + 1) * each, length)
    rows, at = tl.arange(0, ROWS), tl.arange(0, D)
    used = rows < WIDTH * GROUP
    query = sequence * WIDTH + rows // GROUP
    source = q + (query[:, None] * num_heads * GROUP + head * GROUP + (rows % GROUP)[:, None]) * D + at[None]
    queries = tl.load(source, used[:, None], 0.0, cache_modifier=".cg")  # L1 may hold what was there before
    limit = length - WIDTH + rows // GROUP  # the last position that a row attends to: its own
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, D], tl.float32)
    table = page_ids + tl.load(page_starts + sequence)
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
        place = head_row * SPLITS + split
        tl.store(maxima + place, best, used)
        tl.store(sums + place, total, used)
        tl.store(parts + place[:, None] * D + at[None], mean, used[:, None])
        tl.debug_barrier()  # all of the block has written before it says so
        counter = num_done + sequence * num_heads + head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == SPLITS - 1:
            tl.store(counter, 0)
            best = tl.full([ROWS], -float("inf"), tl.float32)
            total = tl.zeros([ROWS], tl.float32)
            mean = tl.zeros([ROWS, D], tl.float32)
            for other in range(SPLITS):
                place = head_row * SPLITS + other
                theirs = tl.load(maxima + place, used, 0.0, cache_modifier=".cg")
                higher = tl.maximum(best, theirs)
                safe = tl.where(higher == -float("inf"), 0.0, higher)
                kept, weight = tl.exp2(best - safe), tl.exp2(theirs - safe)
                part = tl.load(parts + place[:, None] * D + at[None], used[:, None], 0.0, cache_modifier=".cg")
                total = total * kept + weight * tl.load(sums + place, used, 0.0, cache_modifier=".cg")
                mean = mean * kept[:, None] + weight[:, None] * part
                best = higher
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
    scale = head_dim**-0.5 * 1.4426950408889634  # to base 2
    pdl, options = launch_options(q.device)
    _attend[(num_sequences, num_kv, splits)](
        q, kv, page_ids, page_starts, context_lens, out, parts, maxima, sums, num_done, *kv.stride()[:3], scale,
        group, width, max(MIN_ROWS, triton.next_power_of_2(group * width)), head_dim, page_size, splits, TOKENS, pdl,
        num_warps=4, num_stages=3, **options,
    )  # fmt: skip
    return out
