"""Ranks that compute a model together, and what they say to each other within a step."""

from collections.abc import Sequence
from typing import Protocol

import torch


class Group(Protocol):
    """One rank's view of all. Every rank makes the same calls in the same order; a call waits for all of them, and
    raises if one of them is gone or late: at once in host memory, on a GPU whenever its result is asked for."""

    rank: int
    num_ranks: int

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of every rank's part, in its dtype; equal to the bit on all ranks, however many rows it has."""

    def add(self, part: torch.Tensor, stream: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the sum of the parts to a residual stream, all [T, N], in place. Returns what the next norm begins with:
        the stream times its `gain` [N], and float32 [T, B] whose sums are those of the stream's squares."""

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """All parts, of one shape, beside each other in the order of ranks: [..., N] to [..., ranks * N]."""


class Alone:
    """A group of one, whose parts are the whole."""

    rank = 0
    num_ranks = 1

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The part."""
        return part

    def add(self, part: torch.Tensor, stream: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Group.add`."""
        return added(part, stream, gain)

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """The part."""
        return part


def ordered_sum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Added in float32 in the order given, so that the result depends on nothing else; in the dtype of the parts."""
    if len(parts) == 2:
        return parts[0] + parts[1]  # torch rounds this once, too
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def added(total: torch.Tensor, stream: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `Group.add`, of the sum of all parts."""
    stream.add_(total)
    return stream * gain, stream.float().square().sum(dim=-1, keepdim=True)
