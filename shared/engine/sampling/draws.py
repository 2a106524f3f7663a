"""Drawing for many rows at once where their logits are, without waiting for that device.

The noise is that of `gumbel` to the bit, and floats go through the same operations as in `distribution`, in the same
order and precision, so that both choose the same tokens. Those look at few tokens; a device would have to tell the host
how many these are, and looks at all of them instead.
"""

from collections.abc import Iterator, Sequence

import torch

from shared.engine.api import BatchItem
from shared.engine.pinned import put
from shared.engine.sampling import gumbel
from shared.engine.sampling.distribution import units
from shared.engine.splitmix import FACTORS, GOLDEN, SHIFTS

# Rows are drawn together as far as they have so many numbers: it takes some fifty bytes for each meanwhile.
MOST_NUMBERS = 1 << 22


def parts(num_rows: int, num_tokens: int) -> Iterator[slice]:
    """Rows of so many tokens each that are drawn together."""
    num_together = max(1, MOST_NUMBERS // num_tokens)
    return (slice(first, first + num_together) for first in range(0, num_rows, num_together))


def begins(
    asked: Sequence[BatchItem], moved: torch.Tensor | None, device: torch.device, purposes: Sequence[int] = ()
) -> torch.Tensor:
    """Where the noise of each begins, int64 [D]: of all positions that it may be at, the one where it is. Each has a
    purpose (see `gumbel.start`), which is 0 where there are none."""
    found = put(candidates(asked, moved is not None, purposes), torch.int64, device)
    return found if moved is None else found.view(len(asked), -1).gather(1, moved[:, None])[:, 0]


def candidates(asked: Sequence[BatchItem], in_doubt: bool, purposes: Sequence[int] = ()) -> list[int]:
    """As `begins`, of all positions that each may be at if it is `in_doubt` where they are, one behind the other."""
    most = max(item.num_in_doubt for item in asked) if in_doubt else 0
    each = zip(asked, purposes or [0] * len(asked), strict=True)
    return [
        _signed(gumbel.start(item.sampling.seed, item.position + by, purpose))
        for item, purpose in each
        for by in range(most + 1)
    ]


def steps(num_tokens: int, device: torch.device) -> torch.Tensor:
    """By how much further on than a row's beginning the noise of each token begins, int64 [V]."""
    return torch.arange(1, num_tokens + 1, device=device) * _signed(GOLDEN)


def weights(logits: torch.Tensor, largest: torch.Tensor, asked: Sequence[BatchItem]) -> torch.Tensor:
    """As `distribution.weights`, float32 [D, V]."""
    params, vocab_size = [item.sampling for item in asked], logits.shape[1]
    top_k = [each.top_k if each.top_k < vocab_size else 0 for each in params]
    numbers = [(each.temperature, each.min_p, each.top_p, k) for each, k in zip(params, top_k, strict=True)]
    columns = put(numbers, torch.float64, logits.device)
    temperature, min_p = columns[:, :2].float().split(1, dim=1)
    weight = torch.exp((logits - largest) / temperature)
    if any(each.min_p > 0 for each in params):
        weight = torch.where(weight >= min_p, weight, 0)
    if any(top_k):
        weight = _largest(weight, columns[:, 3:].long(), max(top_k))
    if any(each.top_p < 1 for each in params):
        weight = _nucleus(weight, columns[:, 2:3])
    return weight


def _largest(weight: torch.Tensor, k: torch.Tensor, most: int) -> torch.Tensor:
    """Keep the `k` [D, 1] largest of [D, V], at most `most`; all where it is 0."""
    smallest = torch.topk(weight, most).values.gather(1, (k - 1).clamp(min=0))
    above, level = weight > smallest, weight == smallest
    kept = above | (level & (level.cumsum(1) <= k - above.sum(1, keepdim=True))) | (k == 0)
    return torch.where(kept, weight, 0)


def _nucleus(weight: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Keep the fewest of the largest of [D, V] whose share of the sum reaches `p` [D, 1]; all where it is 1. As
    `distribution.top_p`."""
    falling, order = torch.sort(weight, dim=1, descending=True, stable=True)
    each = units(falling)
    total = each.sum(dim=1, keepdim=True)
    wanted = (p * total.double()).ceil().long().clamp(min=1).minimum(total)
    kept = (each.cumsum(1) - each < wanted) | (p >= 1)
    return torch.zeros_like(weight).scatter_(1, order, torch.where(kept, falling, 0))


def pick(weight: torch.Tensor, begins: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """As `gumbel.pick` for each of [D, V]: the tokens that arrive first, int64 [D]; `begins` [D], `steps` [V]."""
    return noise(begins, steps).neg_().log1p_().neg_().div_(weight).argmin(dim=1)


def noise(begins: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """As `gumbel.noise`, float64 [D, V]."""
    words = begins[:, None] + steps
    for factor, shift in zip((*FACTORS, 1), SHIFTS, strict=True):
        words ^= (words >> shift) & (2 ** (64 - shift) - 1)  # the shift is of signed numbers: it draws the sign in
        if factor != 1:
            words *= _signed(factor)
    return ((words >> gumbel.UNUSED_BITS) & (2**52 - 1)).double().add_(0.5).mul_(gumbel.UNIT)


def _signed(word: int) -> int:
    """A word of 64 bits as int64 has it."""
    return word - (word >> 63 << 64)
