"""What a step takes from the one before it on the device, put where its graph looks, in one launch: rows of sequences
that are further on than the host knows, and whatever is copied besides; and some rows of several tensors, in another.
The twin of the first is `Batch.moved_on` where all is in host memory."""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shared.engine.batch import Batch
from shared.engine.kernels.triton_dense import launch_options

BLOCK, COPIED = 128, 1024
MOST_COPIES = 3
Copies = Sequence[tuple[torch.Tensor, torch.Tensor]]


@triton.jit(do_not_specialize=["num_rows", "num_used", "owners", "num_a", "num_b", "num_c"])  # compiled once for all
def _move(
    inputs, tokens, moved, owners, num_rows, num_used, page_size, a, to_a, num_a, b, to_b, num_b, c, to_c, num_c,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    if moved is not None:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        used = row < num_used
        by = tl.load(moved + tl.load(inputs + owners + row, used, 0), used, 0).to(tl.int32)
        position = tl.load(inputs + num_rows + row, used, 0) + by
        start = tl.load(inputs + 3 * num_rows + row, used, 0)
        page = tl.load(inputs + 4 * num_rows + start + position // page_size, used, 0)
        tl.store(inputs + num_rows + row, position, used)
        tl.store(inputs + 2 * num_rows + row, page * page_size + position % page_size, used)
        if tokens is not None:
            tl.store(inputs + row, tl.load(tokens + row, used, 0).to(tl.int32), used)
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    tl.store(to_a + at, tl.load(a + at, at < num_a, 0), at < num_a)
    tl.store(to_b + at, tl.load(b + at, at < num_b, 0), at < num_b)
    tl.store(to_c + at, tl.load(c + at, at < num_c, 0), at < num_c)


def owners(batch: Batch) -> NDArray[np.int32]:
    """Of each row of a step the number of its sequence [T]."""
    return np.arange(batch.num_sequences, dtype=np.int32).repeat(np.diff(batch.query_starts.numpy()))


def move(
    inputs: torch.Tensor,
    num_rows: int,
    batch: Batch,
    page_size: int,
    tokens: torch.Tensor | None = None,
    copied: Copies = (),
) -> None:
    """Move the rows of a `batch` with `moved`, which are laid out in `inputs` as `cuda_glm.Graph` says, `num_rows` with
    those that belong to nobody, and `owners` behind the page ids. `tokens` [T] become its tokens, if given.

    Also copy the first of each pair to the second, of the same dtype and size, of whole words of 32 bits; at most
    MOST_COPIES of them, all contiguous. Of a batch without `moved` that is all.
    """
    num_used, at = batch.num_tokens, 4 * num_rows + len(batch.page_ids)
    words = [(source.view(-1).view(torch.int32), target.view(-1).view(torch.int32)) for source, target in copied]
    each = [(source, target, len(source)) for source, target in words]
    each += [(inputs, inputs, 0)] * (MOST_COPIES - len(each))
    most = max(triton.cdiv(num_used, BLOCK), triton.cdiv(max(num_words for _, _, num_words in each), COPIED))
    _move[(most,)](
        inputs, tokens, batch.moved, at, num_rows, num_used, page_size,
        *(argument for arguments in each for argument in arguments), BLOCK, COPIED,
    )  # fmt: skip


@triton.jit
def _take(rows, sources, targets, sizes, NUM: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + place)
    for each in tl.static_range(NUM):
        inside = at < sizes[each]
        # Not from L1, which may hold what was there before.
        words = tl.load(sources[each] + row * sizes[each] + at, inside, 0, cache_modifier=".cg")
        tl.store(targets[each] + place * sizes[each] + at, words, inside)


def taken(rows: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`rows`, int64 [S], S > 0, of each of the tensors [T, ..]: contiguous, rows of whole words of 32 bits."""
    found = [tensor.new_empty(len(rows), *tensor.shape[1:]) for tensor in tensors]
    sources, targets = (tuple(each.view(len(each), -1).view(torch.int32) for each in of) for of in (tensors, found))
    sizes, (pdl, options) = tuple(each.shape[1] for each in sources), launch_options(rows.device)
    _take[(len(rows), triton.cdiv(max(sizes), COPIED))](
        rows, sources, targets, sizes, len(sizes), COPIED, pdl, **options
    )  # fmt: skip
    return found
