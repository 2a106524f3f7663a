"""A fleet in virtual time whose prefill worker has a bad moment: its steps take several times as long for a while."""

import asyncio
import math
from dataclasses import dataclass, replace

import pytest

from bench.placement.harness import Fleet, hold_all
from bench.placement.virtual import loop
from bench.placement.virtual.cluster import VirtualCluster
from bench.placement.virtual.worker import VirtualWorker
from bench.placement.workloads import Conversation, Turn, singles
from shared.engine.meter import lasts_s

EVERY_S, HEARTBEAT_S, NUM_TOKENS = 0.5, 0.5, 256
FLEET = Fleet(
    num_prefill=1,
    num_decode=1,
    worker_flags="--sim-prefill-ms-per-token 0.5 --sim-decode-ms 20 --sim-decode-ms-per-sequence 0.5",
)


def prompts(begin_s: float, end_s: float) -> list[Conversation]:
    """One after the other, and an answer that is generated all the time."""
    (stream,) = singles(10.0, 0.2, 64, 10, seed=1)[:1]
    (asked,) = stream.turns
    always = replace(stream, turns=(replace(asked, output_tokens=int(end_s / 0.0205)),))
    times_s = [begin_s + EVERY_S * number for number in range(int((end_s - begin_s) / EVERY_S))]
    return [always, *(Conversation(at_s, (_turn(number),)) for number, at_s in enumerate(times_s))]


def _turn(number: int) -> Turn:
    return Turn(tuple(range(1_000 * (number + 1), 1_000 * (number + 1) + NUM_TOKENS)), 2)


async def slowed(worker: VirtualWorker, times: float, begin_s: float, end_s: float) -> None:
    """A bad moment."""
    await asyncio.sleep(begin_s)
    own = worker.model
    worker.model = replace(own, prefill_ms_per_token=times * own.prefill_ms_per_token)
    await asyncio.sleep(end_s - begin_s)
    worker.model = own


@dataclass(frozen=True)
class Given:
    """A prompt that the prefill worker was given, and what it had measured until then."""

    at_s: float
    measured_at_s: float
    steady_s: float


async def computed(times: float, begin_s: float, end_s: float, until_s: float) -> list[Given]:
    cluster, given = VirtualCluster(FLEET), list[Given]()
    worker = cluster.workers["prefill-0"]
    reserve = worker.reserve

    async def noted(*asked: object) -> object:
        prompts = worker.prompts
        given.append(Given(loop.now_s(), prompts.measured_at_s, prompts.steady_s))
        return await reserve(*asked)  # type: ignore[arg-type]

    worker.reserve = noted  # type: ignore[method-assign,assignment]
    async with cluster.running(), asyncio.TaskGroup() as group:
        group.create_task(slowed(worker, times, begin_s, end_s))
        await hold_all(cluster.ask, prompts(0.2, until_s), loop.now_s)
    return given


@pytest.mark.parametrize("times", [4.0, 10.0])
@pytest.mark.parametrize("begin_s", [0.0, 20.0])
def test_prompts_are_handed_over_again_seconds_after_a_bad_moment(times: float, begin_s: float) -> None:
    """However long the worker was well before: what was found in the bad moment was the same for no longer than that,
    and what was left to compute then; and two prompts show that it is over."""
    end_s, until_s = begin_s + 3.0, begin_s + 30.0
    given = loop.run(computed(times, begin_s, end_s, until_s))
    tried = next(each for each in given if each.at_s >= end_s)
    patience_s = HEARTBEAT_S + 2 * EVERY_S
    bad_s = min(lasts_s(tried.steady_s), 2 * (end_s - begin_s))
    assert tried.at_s <= max(end_s, tried.measured_at_s) + math.log(2) * bad_s + patience_s
    well_s = tried.at_s + math.log(2) * lasts_s(end_s - begin_s) + patience_s
    assert len([each for each in given if each.at_s >= well_s]) >= 0.9 * (until_s - well_s) / EVERY_S
