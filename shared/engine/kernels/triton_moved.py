"""Rows of sequences that are further on than the host knows, put where they belong. The twin is `Batch.moved_on` where
all is in host memory."""

import torch
import triton
import triton.language as tl

from shared.engine.batch import Batch
from shared.engine.pinned import put

BLOCK = 128


@triton.jit(do_not_specialize=["num_rows", "num_used"])  # compiled once, whatever a step has
def _move(inputs, moved, owners, num_rows, num_used, page_size, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    used = row < num_used
    by = tl.load(moved + tl.load(owners + row, used, 0), used, 0).to(tl.int32)
    position = tl.load(inputs + num_rows + row, used, 0) + by
    start = tl.load(inputs + 3 * num_rows + row, used, 0)
    page = tl.load(inputs + 4 * num_rows + start + position // page_size, used, 0)
    tl.store(inputs + num_rows + row, position, used)
    tl.store(inputs + 2 * num_rows + row, page * page_size + position % page_size, used)


def move(inputs: torch.Tensor, num_rows: int, batch: Batch, page_size: int) -> None:
    """Move the rows of a `batch` with `moved`, which are laid out in `inputs` as `cuda_glm.Graph` says, `num_rows` with
    those that belong to nobody."""
    assert batch.moved is not None
    owners = torch.arange(batch.num_sequences, dtype=torch.int32).repeat_interleave(batch.query_starts.diff())
    owners, num_used = put(owners, torch.int32, inputs.device), batch.num_tokens
    grid = (triton.cdiv(num_used, BLOCK),)
    _move[grid](inputs, batch.moved, owners, num_rows, num_used, page_size, BLOCK)
