"""Sparse latent attention of few rows by CUDA kernels of our own, `cuda/latent.cu`: selecting, attending, merging.

Twins: `triton_index.select`, `triton_latent.attend_in_parts` and `triton_latent.merge`, behind which is
`sparse_reference`.
"""

import ctypes
from pathlib import Path

import torch

from shared.engine.kernels.cuda_call import call, opened
from shared.engine.kernels.inputs import Queries, Rows, Selected
from shared.engine.kernels.splits import Parts

Pointer, Int = ctypes.c_void_p, ctypes.c_int
LATENT, ROPE, VALUE, MAX_SPLITS = 512, 64, 256, 64
MOST_ROWS = 4  # that are attended to so
BLOCKS, HEADS = 8, 8  # of a cluster, and those that are multiplied at once
MOST_TOKENS = 128  # that a block attends to
MAX_CONTEXT = 1 << 24  # tokens that can be told apart
MOST_HELD = 48 << 10  # scores that a block keeps in its shared memory
FILLING = 4  # splits of all rows and heads
MOST_MERGING = 256  # blocks that merge a token's head each; where that were more, two tokens'
LOG2_E = 1.4426950408889634


class Select(ctypes.Structure):
    """As select.cuh has it."""

    _fields_ = (
        *((name, Pointer) for name in ("scores", "positions", "starts", "page_ids", "slots", "counts")),
        *((name, Int) for name in ("stride", "top_k", "page_size", "first", "held")),
    )


class Attend(ctypes.Structure):
    """As attend.cuh has it."""

    _fields_ = (
        *((name, Pointer) for name in ("latent", "turned", "tokens", "slots", "counts", "parts", "maxima", "sums")),
        *((name, ctypes.c_int64) for name in ("page_stride", "latent_row", "latent_head")),
        *((name, Int) for name in ("num_heads", "num_splits", "top_k", "page_size", "early")),
        ("scale", ctypes.c_float),
    )


class Merge(ctypes.Structure):
    """As latent.cu has it."""

    _fields_ = (
        *((name, Pointer) for name in ("parts", "maxima", "sums", "up_value", "out")),
        *((name, Int) for name in ("num_tokens", "num_heads", "num_splits", "each", "late")),
    )


class CudaLatent:
    """Selects tokens, attends to them, and brings what was found out of latent space. With `pdl` kernels start before
    those in front of them have ended."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def select(
        self,
        scores: torch.Tensor,
        rows: Rows,
        selected: Selected,
        page_size: int,
        *,
        first: bool,
        pdl: bool = True,
    ) -> None:
        """Write the selection of each row from its index scores float32 [T, capacity], capacity <= MAX_CONTEXT; see
        `triton_index.select`."""
        num_rows, capacity = scores.shape
        tensors = (scores, rows.positions, rows.starts, rows.page_ids, selected.slots, selected.counts)
        held = -(-capacity // BLOCKS)
        sizes = capacity, selected.slots.shape[1], page_size, int(first), held if held <= MOST_HELD else 0
        arguments = Select(*(tensor.data_ptr() for tensor in tensors), *sizes)
        call(self._library, "forebay_select", scores.device, ctypes.byref(arguments), num_rows, int(pdl))

    def attend(
        self,
        queries: Queries,
        latents: torch.Tensor,
        selected: Selected,
        scale: float,
        *,
        splits: int = 0,
        early: bool = False,
        pdl: bool = True,
    ) -> Parts:
        """Each split of the selection by itself, as `triton_latent.attend_in_parts`. latents bfloat16
        [pages, page_size, latent + rope], one layer's view of the pool."""
        (num_rows, heads, _), top_k = queries.latent.shape, selected.slots.shape[1]
        splits = splits or num_splits(num_rows, heads, top_k)
        means = torch.empty(num_rows, heads, splits, LATENT, dtype=torch.float32, device=latents.device)
        maxima, sums = (torch.empty_like(means[..., 0]) for _ in range(2))
        tensors = (queries.latent, queries.rope, latents, selected.slots, selected.counts, means, maxima, sums)
        sizes = heads, splits, top_k, latents.shape[1], int(early and pdl)
        arguments = Attend(
            *(tensor.data_ptr() for tensor in tensors), latents.stride(0), *queries.latent.stride()[:2], *sizes,
            scale * LOG2_E,
        )  # fmt: skip
        call(self._library, "forebay_attend", latents.device, ctypes.byref(arguments), num_rows, int(pdl))
        return Parts(means, maxima, sums)

    def merge(self, parts: Parts, up_value: torch.Tensor, *, late: bool = False, pdl: bool = True) -> torch.Tensor:
        """As `triton_latent.merge`: bfloat16 [T, H * v]. `up_value` bfloat16 [H, v, latent].

        Of few splits, with `late`, the kernel behind starts when the one in front has ended: better where it asks for
        much at once (docs/decisions/0064).
        """
        num_tokens, heads, splits, _ = parts.means.shape
        out = up_value.new_empty(num_tokens, heads * VALUE)
        tensors = (parts.means, parts.maxima, parts.sums, up_value, out)
        each = 2 if num_tokens * heads * BLOCKS > MOST_MERGING else 1
        sizes = num_tokens, heads, splits, each, int(late)
        arguments = Merge(*(tensor.data_ptr() for tensor in tensors), *sizes)
        call(self._library, "forebay_merge", out.device, ctypes.byref(arguments), int(pdl))
        return out


def num_splits(num_rows: int, heads: int, top_k: int) -> int:
    """How many splits are fastest (docs/LOG.md): a power of two, whose blocks are given no more than they can take."""
    splits, groups = 1, -(-heads // HEADS)
    while splits * BLOCKS * MOST_TOKENS < top_k or splits < FILLING // (num_rows * groups):
        splits *= 2
    return splits


def suits(queries: Queries, latents: torch.Tensor, up_value: torch.Tensor) -> bool:
    """Whether the kernels are made for such heads, and bulk copies for such pages."""
    sixteens = latents.stride(0) * latents.itemsize % 16 == 0 and latents.data_ptr() % 16 == 0
    sizes = queries.latent.shape[2], queries.rope.shape[2]
    return sizes == (LATENT, ROPE) and up_value.shape[1:] == (VALUE, LATENT) and sixteens


def load(path: Path) -> ctypes.CDLL:
    """The library that `build.cuda_library` makes."""
    signatures = {
        "forebay_select": (ctypes.POINTER(Select), Int, Int, Pointer),
        "forebay_attend": (ctypes.POINTER(Attend), Int, Int, Pointer),
        "forebay_merge": (ctypes.POINTER(Merge), Int, Pointer),
    }
    return opened(path, signatures)
