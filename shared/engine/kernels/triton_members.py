"""Who computes what in a mixture of many tokens, in Triton: members, a token and an expert that it chose each, in the
order of their experts, and tiles of them.

Where a member stands among those of its expert is as it comes; nothing that is computed depends on it. Two kernels, and
nothing waits for the device.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

BLOCK = 512  # choices of a program


@dataclass(frozen=True, slots=True)
class Members:
    """`order` int32 [M], choices (a token times top_k, plus which of its choices) in the order of their experts;
    `places` int32 [T, top_k], where each stands; `ends` int32 [E], where each expert's end.

    `tiles` for each size that was wanted, int32 [.., 3]: an expert, the first of up to so many of its members, and the
    last of all of them (not in it); of no expert, -1, behind the last.
    """

    order: torch.Tensor
    places: torch.Tensor
    ends: torch.Tensor
    tiles: tuple[torch.Tensor, ...]


@triton.jit(do_not_specialize=["num_choices"])
def _count(chosen, counts, num_choices, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_choices
    found = tl.histogram(tl.load(chosen + at, inside, 0), EXPERTS, mask=inside)
    tl.atomic_add(counts + tl.arange(0, EXPERTS), found, found > 0, sem="relaxed")


@triton.jit
def _tile(tile, tiles, count, upto, SIZE: tl.constexpr, EXPERTS: tl.constexpr):
    """Write which expert and which of its members a tile is."""
    each = (count + SIZE - 1) // SIZE
    last = tl.cumsum(each, 0)
    found = (last > tile) & (last - each <= tile)
    tl.store(tiles + tile * 3, tl.max(tl.where(found, tl.arange(0, EXPERTS), -1)))
    tl.store(tiles + tile * 3 + 1, tl.sum(tl.where(found, upto - count + (tile - last + each) * SIZE, 0)))
    tl.store(tiles + tile * 3 + 2, tl.sum(tl.where(found, upto, 0)))


@triton.jit(do_not_specialize=["num_choices", "num_blocks", "num_tiles"])
def _place(
    chosen, counts, cursors, order, places, ends, tiles, other_tiles, num_choices, num_experts, num_blocks, num_tiles,
    EXPERTS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, OTHER_SIZE: tl.constexpr,
):  # fmt: skip
    """Blocks of choices first, then tiles of either size, a program each."""
    program, e = tl.program_id(0), tl.arange(0, EXPERTS)
    count = tl.load(counts + e)
    upto = tl.cumsum(count, 0)
    if program < num_blocks:
        if program == 0:
            tl.store(ends + e, upto, e < num_experts)
        at = program * BLOCK + tl.arange(0, BLOCK)
        inside = at < num_choices
        expert = tl.load(chosen + at, inside, 0)
        start = tl.gather(upto - count, expert, 0)
        place = start + tl.atomic_add(cursors + expert, 1, inside, sem="relaxed")
        tl.store(places + at, place, inside)
        tl.store(order + place, at, inside)
    elif program < num_blocks + num_tiles:
        _tile(program - num_blocks, tiles, count, upto, SIZE, EXPERTS)
    else:
        _tile(program - num_blocks - num_tiles, other_tiles, count, upto, OTHER_SIZE, EXPERTS)


def members(chosen: torch.Tensor, num_experts: int, sizes: tuple[int, int]) -> Members:
    """Of a choice, int32 [T, top_k], with tiles of two sizes."""
    num_choices, block = chosen.numel(), triton.next_power_of_2(num_experts)
    counts, cursors = chosen.new_zeros(2, block)
    order, places, ends = chosen.new_empty(num_choices), torch.empty_like(chosen), chosen.new_empty(num_experts)
    tiles, others = (chosen.new_empty(min(num_choices, num_experts + num_choices // size), 3) for size in sizes)
    num_blocks = triton.cdiv(num_choices, BLOCK)
    _count[(num_blocks,)](chosen, counts, num_choices, block, BLOCK, num_warps=4)
    _place[(num_blocks + len(tiles) + len(others),)](
        chosen, counts, cursors, order, places, ends, tiles, others, num_choices, num_experts, num_blocks, len(tiles),
        block, BLOCK, *sizes, num_warps=4,
    )  # fmt: skip
    return Members(order, places, ends, (tiles, others))
