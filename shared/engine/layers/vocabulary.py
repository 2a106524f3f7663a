"""The two ends of a model, with the vocabulary shared out to ranks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from shared.engine.layers.linear import Linear
from shared.engine.parallel.group import Group

MakeLinear = Callable[[torch.Tensor], Callable[[torch.Tensor], torch.Tensor]]  # of weight [N, K]: x -> x W'


class Embedding:
    """Token ids [T] -> [T, hidden]. `weight` [V / ranks, hidden]; the last ranks may have fewer rows."""

    def __init__(self, weight: torch.Tensor, vocab_size: int, group: Group) -> None:
        self._weight, self._group = weight, group
        self._first = group.rank * -(-vocab_size // group.num_ranks)

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        """Look up."""
        if self._group.num_ranks == 1:
            return F.embedding(token_ids, self._weight)
        rows = token_ids - self._first
        ours = (rows >= 0) & (rows < len(self._weight))
        found = F.embedding(rows.clamp(0, len(self._weight) - 1), self._weight)  # no shape depends on the tokens
        return self._group.sum(found * ours[:, None])


class Head:
    """x [R, hidden] -> logits float32 [R, V or more]: behind the vocabulary there may be columns that mean nothing."""

    def __init__(self, weight: torch.Tensor, vocab_size: int, group: Group, linear: MakeLinear = Linear) -> None:
        self._group = group
        num_missing = -(-vocab_size // group.num_ranks) - len(weight)
        self._product = linear(F.pad(weight, (0, 0, 0, num_missing)) if num_missing else weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product. Where no row is asked for, no rank waits for another."""
        logits = self._product(x).float()
        return self._group.join(logits) if len(x) else logits
