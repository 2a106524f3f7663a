"""What a step takes from the one before it on the device, put where its graph looks: rows of sequences that are further
on than the host knows, in one launch, and whatever is copied besides, in another. The twin of the first is
`Batch.moved_on` where all is in host memory."""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from shared.engine.batch import Batch

BLOCK, COPIED = 128, 1024
MOST_COPIES = 3


@triton.jit(do_not_specialize=["num_rows", "num_used", "owners"])  # compiled once, whatever a step has
def _move(inputs, tokens, moved, owners, num_rows, num_used, page_size, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = row < num_used
    by = tl.load(moved + tl.load(inputs + owners + row, used, 0), used, 0).to(tl.int32)
    position = tl.load(inputs + num_rows + row, used, 0) + by
    start = tl.load(inputs + 3 * num_rows + row, used, 0)
    page = tl.load(inputs + 4 * num_rows + start + position // page_size, used, 0)
    tl.store(inputs + num_rows + row, position, used)
    tl.store(inputs + 2 * num_rows + row, page * page_size + position % page_size, used)
    if tokens is not None:
        tl.store(inputs + row, tl.load(tokens + row, used, 0).to(tl.int32), used)


def owners(batch: Batch) -> NDArray[np.int32]:
    """Of each row of a step the number of its sequence [T]."""
    return np.arange(batch.num_sequences, dtype=np.int32).repeat(np.diff(batch.query_starts.numpy()))


def move(inputs: torch.Tensor, num_rows: int, batch: Batch, page_size: int, tokens: torch.Tensor | None = None) -> None:
    """Move the rows of a `batch` with `moved`, which are laid out in `inputs` as `cuda_glm.Graph` says, `num_rows` with
    those that belong to nobody, and `owners` behind the page ids. `tokens` [T] become its tokens, if given."""
    num_used, at = batch.num_tokens, 4 * num_rows + len(batch.page_ids)
    _move[(triton.cdiv(num_used, BLOCK),)](inputs, tokens, batch.moved, at, num_rows, num_used, page_size, BLOCK)


@triton.jit(do_not_specialize=["num_a", "num_b", "num_c"])
def _copy(a, to_a, num_a, b, to_b, num_b, c, to_c, num_c, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_a + at, tl.load(a + at, at < num_a, 0), at < num_a)
    tl.store(to_b + at, tl.load(b + at, at < num_b, 0), at < num_b)
    tl.store(to_c + at, tl.load(c + at, at < num_c, 0), at < num_c)


def copy(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy each first one to the second, of the same dtype and size, of whole words of 32 bits; at most MOST_COPIES of
    them, all contiguous."""
    words = [(source.view(-1).view(torch.int32), target.view(-1).view(torch.int32)) for source, target in pairs]
    most, nothing = max(len(source) for source, _ in words), (*words[0], 0)
    each = [(source, target, len(source)) for source, target in words]
    each += [nothing] * (MOST_COPIES - len(each))
    _copy[(triton.cdiv(most, COPIED),)](*(argument for arguments in each for argument in arguments), COPIED)
