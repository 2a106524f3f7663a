"""From a row of logits to a distribution.

Everything here works on one row alone, so that a choice depends on nothing but the row and the parameters: not on the
batch, and not on the neighbours in it. Of equally likely tokens the lower id counts as the more likely.
"""

from math import ceil

import torch

from shared.engine.api import SamplingParams

# What weights are counted in where they are added up for top_p: so many units are a weight of 1, and what is less than
# a whole unit is dropped. Whole numbers have the same sum in any order, and those of 2**18 tokens fit into 63 bits.
UNITS = 2.0**44
PART = 16_384  # of a vocabulary: what is made of it on the way stays in the processor's cache
ROUNDED_DOWN = 1 - 1e-6  # a candidate too many does no harm, one too few would


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
    """Keep the fewest of the largest of [V] whose share of the sum reaches `p` (Holtzman et al. 2019), in UNITS.

    Sorting a whole vocabulary is slow, and needless: tokens of at most (total - wanted) / V units have together no more
    than total - wanted, so those above reach what is wanted without them.
    """
    total = sum(int(units(part).sum()) for part in weight.split(PART))
    wanted = wanted_units(total, p)
    least = (total - wanted) // weight.shape[0] / UNITS * ROUNDED_DOWN
    candidates = (weight >= least).nonzero().flatten()
    order = torch.sort(weight[candidates], descending=True, stable=True).indices
    falling = candidates[order]
    each = units(weight[falling])
    nucleus = falling[each.cumsum(0) - each < wanted]
    kept = torch.zeros_like(weight)
    kept[nucleus] = weight[nucleus]
    return kept


def units(weight: torch.Tensor) -> torch.Tensor:
    """Weights of at most 1 in whole UNITS, int64."""
    return (weight * UNITS).long()  # a float32 times a power of two is exact


def wanted_units(total: int, p: float) -> int:
    """How many of `total` units are a share of `p`: at least one, and at most all."""
    return min(max(ceil(p * float(total)), 1), total)


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
