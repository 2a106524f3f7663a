"""Sums over the ranks of one host, and what they have side by side, in one kernel each, through the memory of the other
GPUs (one-shot all-reduce and all-gather).

A part is cut into pieces, a program each. A program writes its piece into the memory of every rank, where it has a
place of its own, looks into its own memory until all ranks' pieces are there, and adds them in float32, in the order of
ranks, or puts them side by side. The twins are `group.ordered_sum`, `group.added` and concatenation.

Nobody says that a piece is there: each value says so itself. Memory that nobody has written to is zeros, and values are
written inverted, so that zeros stand for one NaN out of many, for which another one is sent. So nothing is ordered, and
nothing crosses the link but what is added, once.

Pieces have their places in three turns. A program empties what it read a call before. Whoever writes there next does so
two calls later, having read the call between, which this rank began when it had ended the one that emptied. Turns are
counted per program and on the device, so that a captured step can be replayed. Programs wait for those of the same
number only, and all of them fit on a GPU at once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.kernels.triton_dense import launch_options

SUM_BYTES, JOIN_BYTES = 512, 2048  # of a piece
MOST_SUMMED, MOST_JOINED = 1 << 20, 1 << 21  # bytes of a part
THREAD_BYTES = 16
TURNS = 3
# Looks for what peers send, each of which takes most of a microsecond: then a GPU goes on with whatever there is, for
# its host has long given up, and would else find it busy for ever.
PATIENCE = 100_000_000


@triton.jit
def _send(
    values, peers, own, turns, rank,
    NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Write a program's piece [BLOCK] to all ranks, and empty its places of the call before. Returns its turn, and
    where the first rank's piece will be; that of the next is CAPACITY * BLOCK values further."""
    piece, at = tl.program_id(0), tl.arange(0, BLOCK)
    turn = tl.load(turns + piece, cache_modifier=".cg")  # L1 may hold what was there before
    here = turn * NUM_RANKS * CAPACITY + piece
    inverted = values.to(BITS, bitcast=True) ^ -1
    inverted = tl.where(inverted == 0, 1, inverted)
    for peer in tl.static_range(NUM_RANKS):
        theirs = tl.multiple_of(peers[peer].to(tl.pointer_type(BITS)), 16)
        tl.store(theirs + (here + rank * CAPACITY) * BLOCK + at, inverted)
    mine = tl.multiple_of(own.to(tl.pointer_type(BITS)), 16)
    before = tl.where(turn == 0, 2, turn - 1) * NUM_RANKS * CAPACITY + piece
    for peer in tl.static_range(NUM_RANKS):
        tl.store(mine + (before + peer * CAPACITY) * BLOCK + at, tl.zeros([BLOCK], BITS))
    return turn, mine + here * BLOCK + at


@triton.jit
def _sum_so_far(places, kind: tl.constexpr, NUM_RANKS: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Of what is at its place, and how many values are not there yet."""
    total, absent = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for peer in tl.static_range(NUM_RANKS):
        found = tl.load(places + peer * STRIDE, volatile=True)
        absent = tl.where(found == 0, 1, absent)
        total += (found ^ -1).to(kind, bitcast=True).to(tl.float32)
    return total, tl.sum(absent)


@triton.jit
def _add(
    part, out, stream, gain, squares, peers, own, turns, rank, size, pieces,
    NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, BITS: tl.constexpr, ADD: tl.constexpr,
    PATIENCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    piece = tl.program_id(0)
    row, column = piece // pieces, (piece % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < size, row.to(tl.int64) * size + column
    values = tl.load(part + at, inside, 0.0, cache_modifier=".cg")
    if ADD:
        before = tl.load(stream + at, inside, 0.0, cache_modifier=".cg").to(tl.float32)
        gains = tl.load(gain + column, inside, 0.0).to(tl.float32)
    turn, places = _send(values, peers, own, turns, rank, NUM_RANKS, BLOCK, CAPACITY, BITS)
    total, absent = _sum_so_far(places, part.dtype.element_ty, NUM_RANKS, CAPACITY * BLOCK, BLOCK)
    looks = 0
    while (absent > 0) & (looks < PATIENCE):
        total, absent = _sum_so_far(places, part.dtype.element_ty, NUM_RANKS, CAPACITY * BLOCK, BLOCK)
        looks += 1
    value = total.to(part.dtype.element_ty)
    if ADD:
        value = (before + value.to(tl.float32)).to(value.dtype)
        tl.store(stream + at, value, inside)
        wide = value.to(tl.float32)
        tl.store(squares + piece, tl.sum(wide * wide))
        value = (wide * gains).to(value.dtype)
    tl.store(out + at, value, inside)
    tl.store(turns + piece, tl.where(turn == 2, 0, turn + 1))


@triton.jit
def _join(
    part, out, peers, own, turns, rank, size, pieces,
    NUM_RANKS: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, BITS: tl.constexpr,
    PATIENCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    piece = tl.program_id(0)
    row, column = (piece // pieces).to(tl.int64), (piece % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(part + row * size + column, inside, 0.0, cache_modifier=".cg")
    turn, places = _send(values, peers, own, turns, rank, NUM_RANKS, BLOCK, CAPACITY, BITS)
    peer = tl.arange(0, RANKS)[:, None]
    places, there = places[None, :] + peer * (CAPACITY * BLOCK), peer < NUM_RANKS
    found = tl.load(places, there, 1, volatile=True)
    absent, looks = tl.sum((found == 0).to(tl.int32)), 0
    while (absent > 0) & (looks < PATIENCE):
        found = tl.load(places, there, 1, volatile=True)
        absent = tl.sum((found == 0).to(tl.int32))
        looks += 1
    at = (row * NUM_RANKS + peer) * size + column[None, :]
    tl.store(out + at, (found ^ -1).to(part.dtype.element_ty, bitcast=True), there & inside[None, :])
    tl.store(turns + piece, tl.where(turn == 2, 0, turn + 1))


class Exchange:
    """The memory of all ranks, as one of them sees it, for sums or for joins. `addresses` say where each rank's is, of
    `buffer_bytes(piece_bytes, most_bytes, ranks)` bytes that begin as zeros. Pieces have so many bytes, and parts at
    most so many if their rows are whole pieces."""

    def __init__(
        self, addresses: Sequence[int], rank: int, piece_bytes: int, most_bytes: int, device: torch.device
    ) -> None:
        self._addresses, self._rank, self._piece_bytes = tuple(addresses), rank, piece_bytes
        self._capacity = most_bytes // piece_bytes
        self._turns = torch.zeros(self._capacity, dtype=torch.int32, device=device)

    def takes(self, part: torch.Tensor) -> bool:
        """Whether there is room for a part [.., N]."""
        rows = part.numel() // part.shape[-1] if part.shape[-1] else 0
        return 0 < rows * self._pieces(part) <= self._capacity

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of all parts [.., N], which are contiguous."""
        out = torch.empty_like(part)
        self._add(part, out, None, None, None)
        return out

    def add(self, part: torch.Tensor, stream: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Group.add`; all are contiguous."""
        out = torch.empty_like(part)
        squares = torch.empty((len(part), self._pieces(part)), dtype=torch.float32, device=part.device)
        self._add(part, out, stream, gain, squares)
        return out, squares

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """See `Group.join`; contiguous."""
        size, num_ranks, (pdl, options) = part.shape[-1], len(self._addresses), launch_options(part.device)
        out = part.new_empty((*part.shape[:-1], num_ranks * size))
        _join[self._grid(part)](
            part, out, self._addresses, self._addresses[self._rank], self._turns, self._rank, size, self._pieces(part),
            num_ranks, triton.next_power_of_2(num_ranks), self._piece_bytes // part.element_size(), self._capacity,
            _bits(part), PATIENCE, pdl, num_warps=self._piece_bytes // (32 * THREAD_BYTES), **options,
        )  # fmt: skip
        return out

    def _add(
        self,
        part: torch.Tensor,
        out: torch.Tensor,
        stream: torch.Tensor | None,
        gain: torch.Tensor | None,
        squares: torch.Tensor | None,
    ) -> None:
        size, (pdl, options) = part.shape[-1], launch_options(part.device)
        _add[self._grid(part)](
            part, out, stream, gain, squares, self._addresses, self._addresses[self._rank], self._turns, self._rank,
            size, self._pieces(part), len(self._addresses), self._piece_bytes // part.element_size(), self._capacity,
            _bits(part), stream is not None, PATIENCE, pdl,
            num_warps=self._piece_bytes // (32 * THREAD_BYTES), **options,
        )  # fmt: skip

    def _grid(self, part: torch.Tensor) -> tuple[int]:
        return (part.numel() // part.shape[-1] * self._pieces(part),)

    def _pieces(self, part: torch.Tensor) -> int:
        """Of a row."""
        return -(-part.shape[-1] * part.element_size() // self._piece_bytes)


def _bits(part: torch.Tensor) -> tl.dtype:
    """What a value is sent as."""
    return {2: tl.int16, 4: tl.int32}[part.element_size()]


def buffer_bytes(most_bytes: int, num_ranks: int) -> int:
    """Of each rank."""
    return TURNS * num_ranks * most_bytes
