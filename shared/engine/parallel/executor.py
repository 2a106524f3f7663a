"""One model on several ranks: each computes every step, the first one for an engine, the others after it.

All ranks do the same: the same batch, the same sums over ranks, the same logits to the bit, and so the same tokens by a
sampler that depends on seed and position alone. So nothing but batches goes from the first rank to the others.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from shared.engine.api import BatchItem, Computed, Executor
from shared.errors import WorkerLost


class Follower(Protocol):
    """A rank but the first, as the first sees it."""

    def follow(self, batch: Sequence[BatchItem]) -> None:
        """Have it compute a batch, behind those before; does not wait. Raises OSError if it is gone."""


class ParallelExecutor:
    """Satisfies `shared.engine.api.Executor` with that of the first rank and the followers of `own`'s group."""

    runs_behind = False

    def __init__(self, own: Executor, followers: Sequence[Follower]) -> None:
        self.spec, self.memory = own.spec, own.memory
        self._own, self._followers = own, followers

    @property
    def proposes(self) -> bool:
        """Whether steps have drafts where they are wanted."""
        return self._own.proposes

    def launch(self, batch: Sequence[BatchItem]) -> Computed:
        """Compute a step on all ranks, to its end. Whatever goes wrong, ranks may be out of step from then on:
        WorkerLost."""
        lean = [_lean(item) for item in batch]
        try:
            for follower in self._followers:
                follower.follow(lean)
            return Computed(self._own.launch(lean).chosen())
        except Exception as error:
            raise WorkerLost(f"a rank is gone or late: {type(error).__name__}: {error}") from error


def _lean(item: BatchItem) -> BatchItem:
    """Without what only penalties need: a history may be a million tokens, sent to every rank in every step."""
    return item if item.sampling.has_penalties else replace(item, history=())
