"""What the first rank of a worker tells the others."""

from collections.abc import Sequence
from typing import Any

import pytest

from shared.engine.api import BatchItem, Computed, SamplingParams
from shared.engine.parallel.executor import ParallelExecutor
from shared.errors import WorkerLost


class Own:
    """An executor that computes nothing."""

    spec = memory = None
    proposes = True

    def launch(self, batch: Sequence[BatchItem]) -> Computed:
        return Computed([None] * len(batch))


class Follower:
    def __init__(self, error: OSError | None = None) -> None:
        self.told: list[BatchItem] = []
        self._error = error

    def follow(self, batch: Sequence[BatchItem]) -> None:
        if self._error is not None:
            raise self._error
        self.told += batch


def executor(*followers: Follower) -> ParallelExecutor:
    own: Any = Own()
    return ParallelExecutor(own, followers)


def item(**sampling: float) -> BatchItem:
    params: Any = sampling
    return BatchItem("r", [3], 2, [0], False, SamplingParams(**params), 1, [1, 2, 3, 4], following=4)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0}])
def test_a_history_is_not_sent_where_nothing_depends_on_it(sampling: dict[str, float]) -> None:
    followers = [Follower(), Follower()]
    assert executor(*followers).launch([item(**sampling)]).chosen() == [None]
    assert [(told.history, told.token_ids, told.following) for each in followers for told in each.told] == [
        ((), [3], 4)
    ] * 2


@pytest.mark.parametrize("penalty", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_penalties_need_the_history(penalty: str) -> None:
    follower = Follower()
    executor(follower).launch([item(**{penalty: 0.5})])
    assert follower.told[0].history == [1, 2, 3, 4]


def test_a_follower_that_is_gone_is_the_end_of_the_worker() -> None:
    with pytest.raises(WorkerLost, match="gone or late: BrokenPipeError"):
        executor(Follower(BrokenPipeError())).launch([item()])
