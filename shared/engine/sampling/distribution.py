"""From a row of logits to a distribution.

Everything here works on one row alone, so that a choice depends on nothing but the row and the parameters: not on the
batch, and not on the neighbours in it. Of equally likely tokens the lower id counts as the more likely.
"""

import torch

from shared.engine.api import SamplingParams


def weights(row: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Relative probabilities float32 [V] of logits [V]: temperature (above 0), then min_p, top_k and top_p.

    The most likely token has weight 1, and a token that was cut 0. Each cut sees what the one before it left; at least
    the most likely token stays.
    """
    kept = torch.exp((row - row.max()) / params.temperature)
    if params.min_p > 0:
        kept = torch.where(kept >= params.min_p, kept, 0)
    if 0 < params.top_k < row.shape[0]:
        kept = top_k(kept, params.top_k)
    if params.top_p < 1:
        kept = top_p(kept, params.top_p)
    return kept


def top_k(weight: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the `k` largest of [V]."""
    smallest = torch.topk(weight, k).values[-1]
    above = weight > smallest
    level = (weight == smallest).nonzero().flatten()[: k - int(above.sum())]
    kept = torch.where(above, weight, 0)
    kept[level] = weight[level]
    return kept


def top_p(weight: torch.Tensor, p: float) -> torch.Tensor:
    """Keep the fewest of the largest of [V] whose share of the sum reaches `p` (Holtzman et al. 2019).

    Sorting a whole vocabulary is slow, and needless: the tokens below (1 - p) / V of the sum have together less than
    1 - p of it, so those above reach p without them.
    """
    total = weight.sum(dtype=torch.float64)
    candidates = (weight >= (1 - p) * total / weight.shape[0]).nonzero().flatten()
    order = torch.sort(weight[candidates], descending=True, stable=True).indices
    falling = candidates[order]
    share_before = weight[falling].cumsum(0, dtype=torch.float64) - weight[falling]
    nucleus = falling[share_before < p * total]
    nucleus = nucleus if len(nucleus) else falling[:1]
    kept = torch.zeros_like(weight)
    kept[nucleus] = weight[nucleus]
    return kept


def most_likely(logprobs: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` largest of [V] as (id, value), largest first."""
    count = min(count, logprobs.shape[0])
    if not count:
        return ()
    smallest = torch.topk(logprobs, count).values[-1]
    candidates = (logprobs >= smallest).nonzero().flatten()
    order = torch.sort(logprobs[candidates], descending=True, stable=True).indices[:count]
    ids = candidates[order]
    return tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
