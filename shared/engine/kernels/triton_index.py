"""The sparse selection (DSA) on a GPU: index scores over pages, and the exact highest of them.

The number of programs depends on the room for a context alone, so that a captured graph fits every context; programs
that have nothing to do end at once. Rows that see no more than `top_k` tokens attend to all: for them only the first
layer of a step writes a selection, which stays as it is. The twin is `sparse_reference.select`.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from shared.engine.kernels import triton_scores
from shared.engine.kernels.cuda_latent import MAX_CONTEXT, CudaLatent
from shared.engine.kernels.inputs import Rows, Selected
from shared.engine.kernels.triton_early import wait

KEYS = 64  # of a product
MAX_TILE = 8192  # scores that a program chooses from at a time
SCORE_PROGRAMS = 528
LEAST_OF_TILES = 128  # rows, for which programs of a tile each are faster than clusters


@triton.jit
def _scores(
    q, weights, keys, positions, starts, page_ids, scores, weight_stride, page_stride, capacity, scale,
    HEADS: tl.constexpr, DIM: tl.constexpr, TOP_K: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Keys are older than the kernel in front, so the first ones are asked for before the wait. Programs that have
    nothing to do wait too: who waits for this kernel waits for those in front of it."""
    if PDL:
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    visible = tl.load(positions + row) + 1
    end = tl.where(visible > TOP_K, visible, 0)
    first, by = tl.program_id(1) * KEYS, tl.num_programs(1) * KEYS
    table = page_ids + tl.load(starts + row)
    key = _keys(keys, table, first, end, page_stride, DIM, PAGE_SIZE, KEYS)
    if PDL:
        wait(q)
    if first < end:
        head, d = tl.arange(0, HEADS), tl.arange(0, DIM)
        queries = tl.load(q + (row * HEADS + head[None]) * DIM + d[:, None])
        weight = tl.load(weights + row * weight_stride + head).to(tl.float32) * scale
        for start in range(first, end, by):
            position = start + tl.arange(0, KEYS)
            found = tl.dot(key, queries)
            key = _keys(keys, table, start + by, end, page_stride, DIM, PAGE_SIZE, KEYS)
            score = tl.sum(tl.maximum(found, 0.0) * weight[None], 1)
            tl.store(scores + row * capacity + position, score, position < end)


@triton.jit
def _keys(keys, table, start, end, page_stride, DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, KEYS: tl.constexpr):
    """Those from a position on, past L1, where old ones may be."""
    position, d = start + tl.arange(0, KEYS), tl.arange(0, DIM)
    inside = position < end
    page = tl.load(table + position // PAGE_SIZE, inside, 0).to(tl.int64)
    token = keys + page * page_stride + (position % PAGE_SIZE) * DIM
    return tl.load(token[:, None] + d[None], inside[:, None], 0.0, cache_modifier=".cg")


@triton.jit
def _ordered(score):
    """float32 to uint32 in the same order; what is no number comes last."""
    bits = tl.where(score > -float("inf"), score, -float("inf")).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _highest(order, inside, NUM: tl.constexpr):
    """Which are the NUM highest, of equal ones the first; the NUMth is found bit by bit. All, if there are no more."""
    order = tl.where(inside, order, 0)
    least = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x40000000, tl.uint32)
    count = NUM + 1
    while (bit != 0) & (count != NUM):  # two bits at a time, until none is left or just as many are from `least` on
        one, two, three = least | bit, least | (bit * 2), least | (bit * 3)
        both = tl.sum((order >= one).to(tl.int32) + ((order >= two).to(tl.int32) << 16))
        last = tl.sum((order >= three).to(tl.int32))
        first, second = both & 0xFFFF, both >> 16
        count = tl.where(last >= NUM, last, tl.where(second >= NUM, second, tl.where(first >= NUM, first, count)))
        least = tl.where(last >= NUM, three, tl.where(second >= NUM, two, tl.where(first >= NUM, one, least)))
        bit = bit >> 2
    above = (order > least) & inside
    equal = (order == least) & inside
    missing = NUM - tl.sum(above.to(tl.int32))
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= missing))


@triton.jit
def _slot(table, position, inside, PAGE_SIZE: tl.constexpr):
    return tl.load(table + position // PAGE_SIZE, inside, 0) * PAGE_SIZE + position % PAGE_SIZE


@triton.jit
def _select(
    scores, positions, starts, page_ids, slots, counts, orders, places, capacity,
    TOP_K: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, FIRST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        wait(positions)
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    visible = tl.load(positions + row) + 1
    table = page_ids + tl.load(starts + row)
    if visible <= TOP_K:
        if FIRST and tile == 0:
            position = tl.arange(0, TOP_K)
            inside = position < visible
            tl.store(slots + row * TOP_K + position, _slot(table, position, inside, PAGE_SIZE), inside)
            tl.store(counts + row, visible)
    elif tile * TILE < visible:
        position = tile * TILE + tl.arange(0, TILE)
        inside = position < visible
        order = _ordered(tl.load(scores + row * capacity + position, inside, -float("inf")))
        kept = _highest(order, inside, TOP_K)
        place = tl.cumsum(kept.to(tl.int32), 0) - 1
        if visible <= TILE:
            tl.store(slots + row * TOP_K + place, _slot(table, position, kept, PAGE_SIZE), kept)
            tl.store(counts + row, TOP_K)
        else:  # one of several tiles: its highest compete with those of the others
            place += ((row * tl.num_programs(1) + tile) * TOP_K).to(tl.int32)
            tl.store(orders + place, order.to(tl.int32, bitcast=True), kept)
            tl.store(places + place, position, kept)


@triton.jit
def _merge(
    positions, starts, page_ids, slots, counts, orders, places, num_tiles,
    TOP_K: tl.constexpr, PAGE_SIZE: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        wait(positions)
    row = tl.program_id(0).to(tl.int64)
    visible = tl.load(positions + row) + 1
    if visible > TILE:
        table = page_ids + tl.load(starts + row)
        at = tl.arange(0, TILE)
        own = row * num_tiles * TOP_K
        used = (tl.cdiv(visible, TILE) - 1) * TOP_K + tl.minimum(visible - (visible - 1) // TILE * TILE, TOP_K)
        for start in range(0, used, TILE - TOP_K):
            # The best so far, at the place of those read last, and then the next ones.
            source = tl.where(start > 0, start - TOP_K + at, at)
            inside = source < tl.minimum(used, start + TILE - TOP_K)
            order = tl.load(orders + own + source, inside, 0).to(tl.uint32, bitcast=True)
            position = tl.load(places + own + source, inside, 0)
            kept = _highest(order, inside, TOP_K)
            place = tl.cumsum(kept.to(tl.int32), 0) - 1
            if start + TILE - TOP_K >= used:
                tl.store(slots + row * TOP_K + place, _slot(table, position, kept, PAGE_SIZE), kept)
            else:
                tl.debug_barrier()
                place += start + TILE - 2 * TOP_K
                tl.store(orders + own + place, order.to(tl.int32, bitcast=True), kept)
                tl.store(places + own + place, position, kept)
                tl.debug_barrier()
        tl.store(counts + row, TOP_K)


def select(
    q: torch.Tensor,
    weights: torch.Tensor,
    keys: torch.Tensor,
    rows: Rows,
    selected: Selected,
    capacity: int,
    kernels: CudaLatent | None = None,
    *,
    first: bool,
    together: bool = False,
    tile: int = 0,
    pdl: bool = True,
) -> None:
    """Write the selection of each row; see `sparse_reference.select`.

    q [T, H, D]; weights [T, H], rows may be strided; keys [pages, page_size, D], one layer's view of the pool; no row
    sees more than `capacity` tokens. `first`: this is the first layer of the step that selects. `together`: the rows
    are one sequence's and follow each other. `kernels` find the highest scores, if they are there and it pays.
    """
    (num_rows, heads, dim), top_k, page_size = q.shape, selected.slots.shape[1], keys.shape[1]
    scores = torch.empty(num_rows, capacity, dtype=torch.float32, device=q.device)
    tables = rows.positions, rows.starts, rows.page_ids
    num_blocks = min(triton.cdiv(capacity, KEYS), max(1, SCORE_PROGRAMS // num_rows))
    if capacity > top_k and together:
        triton_scores.scores(q, weights, keys, rows, scores)
    elif capacity > top_k:
        _scores[(num_rows, num_blocks)](
            q, weights, keys, *tables, scores, weights.stride(0), keys.stride(0), capacity, (heads * dim) ** -0.5,
            heads, dim, top_k, page_size, KEYS, pdl, num_warps=4, num_stages=2, launch_pdl=pdl,
        )  # fmt: skip
    if capacity <= top_k and not first:
        return
    by_tiles = num_rows >= LEAST_OF_TILES and capacity <= max(MAX_TILE, tile)
    if kernels is not None and capacity <= MAX_CONTEXT and not by_tiles:
        kernels.select(scores, rows, selected, page_size, first=first, pdl=pdl)
    else:
        _highest_of(scores, rows, selected, page_size, tile, first=first, pdl=pdl)


def _highest_of(
    scores: torch.Tensor, rows: Rows, selected: Selected, page_size: int, tile: int, *, first: bool, pdl: bool
) -> None:
    """Tile by tile, each by one program."""
    (num_rows, capacity), top_k = scores.shape, selected.slots.shape[1]
    tile = tile or min(MAX_TILE, max(4 * top_k, triton.next_power_of_2(capacity)))
    num_tiles = triton.cdiv(capacity, tile)
    warps = min(16, max(4, tile // 512))
    orders, places = (
        torch.empty(num_rows, num_tiles if num_tiles > 1 else 0, top_k, dtype=torch.int32, device=scores.device)
        for _ in range(2)
    )
    tables = rows.positions, rows.starts, rows.page_ids
    _select[(num_rows, num_tiles)](
        scores, *tables, selected.slots, selected.counts, orders, places, capacity,
        top_k, page_size, tile, first, pdl, num_warps=warps, launch_pdl=pdl,
    )  # fmt: skip
    if num_tiles > 1:
        _merge[(num_rows,)](
            *tables, selected.slots, selected.counts, orders, places, num_tiles,
            top_k, page_size, tile, pdl, num_warps=warps, launch_pdl=pdl,
        )  # fmt: skip


def empty(num_rows: int, top_k: int, device: torch.device) -> Selected:
    """Room for a selection."""
    return Selected(
        torch.empty(num_rows, top_k, dtype=torch.int32, device=device),
        torch.empty(num_rows, dtype=torch.int32, device=device),
    )
