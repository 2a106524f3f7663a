"""One model on several ranks: each computes every step, the first one for an engine, the others after it.

All ranks do the same: the same batch, the same sums over ranks, the same logits to the bit, and so the same tokens by a
sampler that depends on seed and position alone. So nothing but batches goes from the first rank to the others. On GPUs
that holds for tokens that the host has not heard of yet, too: each rank has them where it computes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from shared.engine.api import BatchItem, Chosen, Executor, Recorded, Step
from shared.errors import WorkerLost

# Between two looks at a step that ranks compute on GPUs: little beside a step, and the next one is on its way already.
LOOK_AGAIN_S = 50e-6


class Follower(Protocol):
    """A rank but the first, as the first sees it."""

    def follow(self, batch: Sequence[BatchItem]) -> None:
        """Have it compute a batch, behind those before; does not wait. Raises OSError if it is gone."""

    def is_gone(self) -> bool:
        """Whether it computes no more."""


@dataclass(frozen=True, slots=True)
class RankedStep:
    """A step on its way on all ranks; satisfies `Step`. Nobody can end a GPU's wait for another that does not come, so
    it is left alone after `patience_s`, or when a follower is gone."""

    own: Step
    followers: Sequence[Follower]
    patience_s: float
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def is_done(self) -> bool:
        """See `Step.is_done`."""
        return self.own.is_done()

    def chosen(self) -> list[Chosen | None]:
        """See `Step.chosen`. Raises WorkerLost."""
        try:
            self._wait()
            return self.own.chosen()
        except WorkerLost:
            raise
        except Exception as error:
            raise _lost(error) from error

    def _wait(self) -> None:
        ends_at = self.clock() + self.patience_s
        while not self.own.is_done():
            if any(follower.is_gone() for follower in self.followers):
                raise WorkerLost("a rank is gone")
            if self.clock() > ends_at:
                raise WorkerLost(f"a rank is late: the others waited {self.patience_s:g} s")
            self.sleep(LOOK_AGAIN_S)


class ParallelExecutor:
    """Satisfies `shared.engine.api.Executor` with that of the first rank and the followers of `own`'s group, which wait
    `patience_s` for each other."""

    def __init__(self, own: Executor, followers: Sequence[Follower], patience_s: float) -> None:
        self.spec, self.memory = own.spec, own.memory
        self._own, self._followers, self._patience_s = own, followers, patience_s

    @property
    def recorded(self) -> Recorded | None:
        """Which steps are recorded at their first use, by every rank."""
        return self._own.recorded

    @property
    def proposes(self) -> bool:
        """Whether steps have drafts where they are wanted."""
        return self._own.proposes

    @property
    def runs_behind(self) -> bool:
        """Whether `launch` returns before the step is computed."""
        return self._own.runs_behind

    def launch(self, batch: Sequence[BatchItem]) -> RankedStep:
        """Compute a step on all ranks. Whatever goes wrong, ranks may be out of step from then on: WorkerLost, now or
        when the step is asked for its choices."""
        lean = [_lean(item) for item in batch]
        try:
            for follower in self._followers:
                follower.follow(lean)
            return RankedStep(self._own.launch(lean), self._followers, self._patience_s)
        except Exception as error:
            raise _lost(error) from error


def _lost(error: Exception) -> WorkerLost:
    return WorkerLost(f"a rank is gone or late: {type(error).__name__}: {error}")


def _lean(item: BatchItem) -> BatchItem:
    """Without what only penalties need: a history may be a million tokens, sent to every rank in every step."""
    return item if item.sampling.has_penalties else replace(item, history=())
