"""How many drafts of each sequence are what was chosen, and what follows from it, in one launch. The twin is
`speculation.late.verify`."""

import torch
import triton
import triton.language as tl

MOST_DRAFTS = 64


@triton.jit(do_not_specialize=["num_drafts"])
def _verify(tokens, given, moved, num_right, last, by, rows, num_drafts, MOST: tl.constexpr):
    sequence, draft = tl.program_id(0), tl.arange(0, MOST)
    first, is_draft = sequence * (num_drafts + 1), draft < num_drafts
    chosen = tl.load(tokens + first + draft, is_draft, 0).to(tl.int64)
    is_wrong = is_draft & (chosen != tl.load(given + first + draft + 1, is_draft, 0).to(tl.int64))
    right = tl.min(tl.where(is_wrong, draft, num_drafts))
    before = 0
    if moved is not None:
        before = tl.load(moved + sequence)
    tl.store(num_right + sequence, right)
    tl.store(last + sequence, tl.load(tokens + first + right))
    tl.store(by + sequence, right + before)
    tl.store(rows + sequence, first + right)


def verify(tokens: torch.Tensor, given: torch.Tensor, moved: torch.Tensor | None, num_drafts: int) -> torch.Tensor:
    """int64 [4, N] of N sequences with so many drafts each: how many of these are right; the token chosen behind them;
    the former and how far the sequence was `moved` [N]; and the row of the step from which it goes on. `tokens` [T]
    were chosen behind the `given` ones [T]. At most MOST_DRAFTS."""
    found = torch.empty(4, len(tokens) // (num_drafts + 1), dtype=torch.int64, device=tokens.device)
    _verify[(found.shape[1],)](tokens, given, moved, *found.unbind(), num_drafts, MOST_DRAFTS)
    return found
