"""Ranks that compute a model together, and what they say to each other within a step."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Group(Protocol):
    """One rank's view of all. Every rank makes the same calls in the same order; a call waits for all of them, and
    raises if one of them is gone or late."""

    rank: int
    num_ranks: int

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's part, in its dtype; equal to the bit on all ranks, however many rows it has."""

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """All parts, of one shape, beside each other in the order of ranks: [..., N] to [..., ranks * N]."""


class Alone:
    """A group of one, whose parts are the whole."""

    rank = 0
    num_ranks = 1

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The part."""
        return part

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """The part."""
        return part


def ordered_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Added in float32 in the order given, so that the result depends on nothing else; in the dtype of the parts."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)
