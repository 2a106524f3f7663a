"""Verification of drafts: the model chooses as if there were none, and a draft counts if it is what was chosen.

So drafts change how many tokens a step yields, never which (docs/decisions). Rejection sampling chooses otherwise
(`sampling.rejection`), and there, too, a draft counts if it is what was chosen.
"""

from collections.abc import Callable
from dataclasses import replace

from shared.engine.api import BatchItem, SampledToken

# Chooses for one row of logits, told by its number within the item, as if the item ended there.
Choose = Callable[[int, BatchItem], SampledToken]


def verified(item: BatchItem, choose: Choose) -> tuple[SampledToken, ...]:
    """The accepted drafts, and one token more: what the model chose instead of the first wrong one, or behind them all.

    Nothing is chosen behind a draft that is wrong.
    """
    tokens = []
    for row, draft in enumerate((*item.drafts, None)):
        tokens.append(choose(row, up_to(item, row)))
        if tokens[-1].token_id != draft:
            break
    return tuple(tokens)


def up_to(item: BatchItem, num_drafts: int) -> BatchItem:
    """The item as if its first `num_drafts` drafts were chosen, and there were no others."""
    if not item.num_drafts:
        return item
    # Copying a long history is for those who need it.
    longer = num_drafts and item.sampling.has_penalties
    history = (*item.history, *item.drafts[:num_drafts]) if longer else item.history
    kept = item.token_ids[: len(item.token_ids) - item.num_drafts + num_drafts]
    allowed = item.allowed[num_drafts : num_drafts + 1]
    return replace(item, token_ids=kept, history=history, num_drafts=0, allowed=allowed)
