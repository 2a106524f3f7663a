"""Sums over the ranks of one host, and what they have side by side, in one kernel each, through the memory of the other
GPUs (one-shot all-reduce and all-gather).

A part is cut into pieces, a program each. A program copies its piece to where the peers can read it, tells them so,
waits until they have said the same, and adds all ranks' pieces in float32, in the order of ranks, or puts them side by
side. The twins are `group.ordered_sum`, `group.added` and concatenation.

What peers read is kept twice, in turns. A program writes over what it wrote two calls before; since then every peer has
announced the call between, and its kernel of the call before that has ended, so nobody reads it any more. Calls are
counted per program and on the device, so that a captured step can be replayed; counts wrap around, and only their
difference is looked at. Programs wait for those of the same number only, and all of them fit on a GPU at once.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.kernels.triton_dense import launch_options

SUM_BYTES, JOIN_BYTES = 4096, 8192  # of a piece
NUM_PIECES = 256
# Looks at a peer's count, each of which takes most of a microsecond: then a GPU goes on with whatever there is, for its
# host has long given up, and would else find it busy for ever.
PATIENCE = 100_000_000


@triton.jit
def _shared(
    values, buffers, flags, calls, rank,
    NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, PATIENCE: tl.constexpr,
):  # fmt: skip
    """Let the peers have a program's piece [BLOCK], and wait for theirs: where they are in each rank's memory, and the
    number of the call, which the program notes when it has read them."""
    piece = tl.program_id(0)
    call = tl.load(calls + piece, cache_modifier=".cg") + 1  # L1 may hold what was there before
    kept = ((call & 1) * CAPACITY + piece) * BLOCK + tl.arange(0, BLOCK)
    own = tl.multiple_of(tl.load(buffers + rank).to(tl.pointer_type(values.dtype)), 16)
    tl.store(own + kept, values)
    tl.debug_barrier()
    for peer in tl.static_range(NUM_RANKS):
        theirs = tl.load(flags + peer).to(tl.pointer_type(tl.int32))
        tl.atomic_xchg(theirs + piece * NUM_RANKS + rank, call, sem="release", scope="sys")
    heard = tl.load(flags + rank).to(tl.pointer_type(tl.int32)) + piece * NUM_RANKS
    for peer in tl.static_range(NUM_RANKS):
        behind, looks = call - tl.atomic_add(heard + peer, 0, sem="acquire", scope="sys"), 0
        while (behind > 0) & (looks < PATIENCE):
            behind = call - tl.atomic_add(heard + peer, 0, sem="acquire", scope="sys")
            looks += 1
    tl.debug_barrier()
    return kept, call


@triton.jit
def _add(
    part, out, stream, gain, squares, buffers, flags, calls, rank, size, pieces,
    NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, ADD: tl.constexpr, PATIENCE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    piece = tl.program_id(0)
    row, column = piece // pieces, (piece % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside, at = column < size, row.to(tl.int64) * size + column
    values = tl.load(part + at, inside, 0.0, cache_modifier=".cg")
    kept, call = _shared(values, buffers, flags, calls, rank, NUM_RANKS, BLOCK, CAPACITY, PATIENCE)
    kind = tl.pointer_type(part.dtype.element_ty)
    total = tl.zeros([BLOCK], tl.float32)
    for peer in tl.static_range(NUM_RANKS):
        theirs = tl.multiple_of(tl.load(buffers + peer).to(kind), 16)
        total += tl.load(theirs + kept, cache_modifier=".cg").to(tl.float32)
    value = total.to(part.dtype.element_ty)
    if ADD:
        before = tl.load(stream + at, inside, 0.0, cache_modifier=".cg")
        value = (before.to(tl.float32) + value.to(tl.float32)).to(value.dtype)
        tl.store(stream + at, value, inside)
        wide = value.to(tl.float32)
        tl.store(squares + piece, tl.sum(wide * wide))
        value = (wide * tl.load(gain + column, inside, 0.0).to(tl.float32)).to(value.dtype)
    tl.store(out + at, value, inside)
    tl.debug_barrier()
    tl.store(calls + piece, call)


@triton.jit
def _join(
    part, out, buffers, flags, calls, rank, size, pieces,
    NUM_RANKS: tl.constexpr, BLOCK: tl.constexpr, CAPACITY: tl.constexpr, PATIENCE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    piece = tl.program_id(0)
    row, column = (piece // pieces).to(tl.int64), (piece % pieces) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    values = tl.load(part + row * size + column, inside, 0.0, cache_modifier=".cg")
    kept, call = _shared(values, buffers, flags, calls, rank, NUM_RANKS, BLOCK, CAPACITY, PATIENCE)
    kind = tl.pointer_type(part.dtype.element_ty)
    for peer in tl.static_range(NUM_RANKS):
        theirs = tl.multiple_of(tl.load(buffers + peer).to(kind), 16)
        values = tl.load(theirs + kept, cache_modifier=".cg")
        tl.store(out + (row * NUM_RANKS + peer) * size + column, values, inside)
    tl.debug_barrier()
    tl.store(calls + piece, call)


class Exchange:
    """The memory of all ranks, as one of them sees it, for sums or for joins. `buffers` and `flags` are int64 [ranks]
    on the device: where each rank's pieces are, of so many bytes each, `buffer_bytes(piece_bytes)` in all, and its
    counts, `flag_bytes(ranks)` bytes that begin as zeros."""

    def __init__(self, buffers: torch.Tensor, flags: torch.Tensor, rank: int, piece_bytes: int) -> None:
        self._buffers, self._flags, self._rank, self._piece_bytes = buffers, flags, rank, piece_bytes
        self._calls = torch.zeros(NUM_PIECES, dtype=torch.int32, device=buffers.device)

    def takes(self, part: torch.Tensor) -> bool:
        """Whether there is room for a part [.., N]."""
        rows = part.numel() // part.shape[-1] if part.shape[-1] else 0
        return 0 < rows * self._pieces(part) <= NUM_PIECES

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
        size, (pdl, options) = part.shape[-1], launch_options(part.device)
        out = part.new_empty((*part.shape[:-1], len(self._buffers) * size))
        _join[self._grid(part)](
            part, out, self._buffers, self._flags, self._calls, self._rank, size, self._pieces(part),
            len(self._buffers), self._piece_bytes // part.element_size(), NUM_PIECES, PATIENCE, pdl,
            num_warps=8, **options,
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
            part, out, stream, gain, squares, self._buffers, self._flags, self._calls, self._rank, size,
            self._pieces(part), len(self._buffers), self._piece_bytes // part.element_size(), NUM_PIECES,
            stream is not None, PATIENCE, pdl, num_warps=8, **options,
        )  # fmt: skip

    def _grid(self, part: torch.Tensor) -> tuple[int]:
        return (part.numel() // part.shape[-1] * self._pieces(part),)

    def _pieces(self, part: torch.Tensor) -> int:
        """Of a row."""
        return -(-part.shape[-1] * part.element_size() // self._piece_bytes)


def buffer_bytes(piece_bytes: int) -> int:
    """Of each rank."""
    return 2 * NUM_PIECES * piece_bytes


def flag_bytes(num_ranks: int) -> int:
    """Of each rank."""
    return NUM_PIECES * num_ranks * 4
