"""What the first rank of a worker tells the others, and how it waits for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from shared.engine.api import BatchItem, Chosen, Recorded, SamplingParams, Step
from shared.engine.parallel.executor import ParallelExecutor, RankedStep
from shared.errors import WorkerLost


@dataclass
class Late:
    """A step that is done at the end of so many looks at it, and then, if it is so, raises."""

    num_looks: float = 0
    error: Exception | None = None

    def is_done(self) -> bool:
        self.num_looks -= 1
        return self.num_looks < 0

    def chosen(self) -> list[Chosen | None]:
        assert self.num_looks < 0, "nobody waits within it: it might never return"
        if self.error is not None:
            raise self.error
        return [None]


class Own:
    """An executor that computes nothing."""

    spec = memory = None
    proposes, runs_behind = True, True
    recorded: Recorded | None = Recorded((1, 2), 4)

    def __init__(self, step: Step) -> None:
        self._step = step

    def launch(self, batch: Sequence[BatchItem]) -> Step:
        return self._step


@dataclass
class Follower:
    error: OSError | None = None
    gone: bool = False
    told: list[BatchItem] = field(default_factory=list)

    def follow(self, batch: Sequence[BatchItem]) -> None:
        if self.error is not None:
            raise self.error
        self.told += batch

    def is_gone(self) -> bool:
        return self.gone


def executor(*followers: Follower, step: Step | None = None) -> ParallelExecutor:
    own: Any = Own(step or Late())
    return ParallelExecutor(own, followers, patience_s=30.0)


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


def test_ranks_are_as_far_behind_as_their_first_one_and_a_step_is_waited_for_when_it_is_asked_for() -> None:
    ranked = executor(Follower(), step=Late(num_looks=3))
    assert ranked.runs_behind
    step = ranked.launch([item()])
    assert not step.is_done()
    assert step.chosen() == [None]


def test_a_step_of_which_a_follower_is_gone_is_left_alone() -> None:
    step = executor(Follower(gone=True), step=Late(num_looks=float("inf"))).launch([item()])
    with pytest.raises(WorkerLost, match="a rank is gone"):
        step.chosen()


def test_a_step_that_takes_too_long_is_left_alone() -> None:
    times = iter([0.0, 1.9, 2.1])
    step = RankedStep(
        Late(num_looks=float("inf")), [Follower()], 2.0, clock=lambda: next(times), sleep=lambda seconds: None
    )
    with pytest.raises(WorkerLost, match="a rank is late: the others waited 2 s"):
        step.chosen()


def test_what_goes_wrong_in_a_step_is_the_end_of_the_worker_too() -> None:
    step = executor(Follower(), step=Late(error=RuntimeError("no answer"))).launch([item()])
    with pytest.raises(WorkerLost, match="gone or late: RuntimeError: no answer"):
        step.chosen()
