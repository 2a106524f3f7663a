"""What prompts are expected to take, and what becomes of rates that were measured at a bad moment."""

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from statistics import mean

import pytest

from bench.placement.harness import Fleet, hold_all
from bench.placement.virtual import loop
from bench.placement.virtual.cluster import VirtualCluster
from bench.placement.workloads import singles
from services.router.candidate import Weights
from shared.blackboard.records import Load
from shared.engine.meter import LASTS_S, PromptCost
from shared.worker.measures import doubt
from tests.unit.fleets import place, query, worker

WEIGHTS = Weights()
STEP_MS = 20.0


# Steps that a prompt shares -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_tokens", "num_steps"), [(32, 1.5), (512, 1.5), (513, 2.5), (1_000, 2.5)])
def test_beside_those_who_generate_a_prompt_waits_for_half_a_step_and_shares_one_for_each_chunk(
    num_tokens: int, num_steps: float
) -> None:
    placed = place(query(num_tokens), [worker("d1", decoding=3)], WEIGHTS)
    assert dict(placed.terms)["steps"] == num_steps * STEP_MS
    assert placed.expected_ms == num_tokens * 0.5 + num_steps * STEP_MS


def test_where_nobody_generates_there_are_no_steps_to_share() -> None:
    assert dict(place(query(), [worker("d1")], WEIGHTS).terms)["steps"] == 0
    handed_over = place(query(), [worker("p1", decoding=3), worker("d1", decoding=3)], WEIGHTS)
    assert (handed_over.names, handed_over.expected_ms) == (("d1", "p1"), 500)


def test_a_prompt_that_is_short_beside_a_step_is_worth_handing_over() -> None:
    quick = Load(prefill_ms_per_token=0.03, decode_step_ms=STEP_MS)
    for num_decoding, prefill in ((0, ""), (1, "p1")):
        fleet = [worker("p1", load=quick), worker("d1", decoding=num_decoding, load=quick)]
        assert place(query(64), fleet, WEIGHTS).names == ("d1", prefill)


def test_prompts_of_one_step_share_it() -> None:
    """So what one of them takes of its worker's time, and who comes next has to wait for, is a part of the step."""
    placed = place(query(128), [worker("d1", decoding=3)], WEIGHTS)
    assert placed.prefill_ms == 128 * 0.5 + STEP_MS * 128 / WEIGHTS.chunk_tokens


def test_what_workers_find_is_what_was_expected_though_steps_take_longer_than_the_prompts() -> None:
    """A prompt of 32 tokens takes 3 ms here, and waits for steps of 20 ms and more. What a single worker finds of some
    dozens differs by a fifth from run to run."""
    flags = "--sim-prefill-ms-per-token 0.1 --sim-decode-ms 20 --sim-decode-ms-per-sequence 0.5 --max-step-tokens 512"

    async def ratios(seed: int) -> list[float]:
        streams = singles(1.0, 12.0, 64, 200, seed=seed)
        prompts = [replace(one, starts_s=one.starts_s + 1.0) for one in singles(8.0, 16.0, 32, 8, seed=100 + seed)]
        cluster = VirtualCluster(Fleet(num_decode=2, worker_flags=flags))
        async with cluster.running():
            await hold_all(cluster.ask, streams + prompts, loop.now_s)
        return [each.load().prompt_ratio for each in cluster.workers.values()]

    assert mean(ratio for seed in range(4) for ratio in loop.run(ratios(seed))) == pytest.approx(1, abs=0.2)


# Rates measured at a bad moment ---------------------------------------------------------------------------------------


class Measured:
    """A worker's rate of prompts: steps of a bad moment at start-up, and prompts since, at its own speed."""

    def __init__(self, ms_per_token: float, num_tokens: int, true_ms: float = 1.0) -> None:
        self._cost, self._true_ms = PromptCost(memory=8_192), true_ms
        while num_tokens > 0:
            self._add(min(512, num_tokens), ms_per_token, 0.0)
            num_tokens -= 512

    def _add(self, num_tokens: int, ms_per_token: float, now: float) -> None:
        self._cost.add(num_tokens, num_tokens**2 / 2, num_tokens * ms_per_token, now)

    def compute(self, num_tokens: int, now: float) -> None:
        """A prompt."""
        self._add(num_tokens, self._true_ms, now)

    def load(self, now: float) -> Load:
        """As it would report it."""
        cost = self._cost
        doubted = doubt(cost.num_tokens, now - cost.measured_at_s, cost.steady_s)
        return Load(prefill_ms_per_token=cost.ms_per_token, prefill_doubt=doubted, decode_step_ms=STEP_MS)


def computing(rates: dict[str, Measured], times_s: Iterable[float]) -> list[str]:
    """Who computes each of some prompts of 200 tokens that come at these times."""
    chosen = []
    for now in times_s:
        placed = place(query(200), [worker(name, load=rate.load(now)) for name, rate in rates.items()], WEIGHTS)
        assert placed.computing is not None
        rates[placed.computing.name].compute(200, now)
        chosen.append(placed.computing.name)
    return chosen


def every(pause_s: float, num_prompts: int) -> list[float]:
    return [number * pause_s for number in range(num_prompts)]


@pytest.mark.parametrize("slowed", [1.5, 4.0, 10.0])
def test_after_a_busy_start_up_prompts_are_handed_over_within_ten_of_them(slowed: float) -> None:
    """The prefill worker's few first tokens were measured while everything started; all are equally fast since."""
    chosen = computing({"p1": Measured(slowed, 64), "d1": Measured(1.0, 64)}, every(0.3, 40))
    first = chosen.index("p1")
    assert 0 < first < 10
    assert chosen[-20:].count("p1") >= 18


def test_who_knows_half_as_much_as_others_is_tried_whatever_it_measured() -> None:
    chosen = computing({"p1": Measured(4.0, 400), "d1": Measured(1.0, 400)}, every(0.3, 20))
    assert 0 < chosen.index("p1") < 10


@pytest.mark.parametrize(("slowed", "pause_s"), [(4.0, 0.1), (4.0, 1.0), (1.6, 0.1), (1.6, 1.0)])
def test_what_was_measured_well_at_a_bad_moment_is_measured_again_and_believed_in_seconds(
    slowed: float, pause_s: float
) -> None:
    """It was never the same for long, so it is not believed for longer than the least."""
    times_s = every(pause_s, 200)
    chosen = computing({"p1": Measured(slowed, 4_096), "d1": Measured(1.0, 4_096)}, times_s)
    assert 0 < times_s[chosen.index("p1")] <= LASTS_S[0] * math.log(2) + 2 * pause_s
    settled = next(at for at in times_s if at >= 4 * LASTS_S[0])
    assert set(chosen[times_s.index(settled) :]) == {"p1"}


def test_a_worker_that_is_slower_is_tried_ever_more_seldom() -> None:
    """A rate that was found again is the same for longer by then, and believed for as long."""
    times_s = every(0.2, 1_500)
    chosen = computing({"p1": Measured(4.0, 4_096, true_ms=4.0), "d1": Measured(1.0, 4_096)}, times_s)
    tried = [at for at, name in zip(times_s, chosen, strict=True) if name == "p1"]
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert all(later > earlier - 1e-6 for earlier, later in pairwise(pauses)), tried
    assert min(pauses[-3:]) > LASTS_S[1] / 2, "in the end it is left alone for most of a minute"
    assert len(tried) < 20


def test_a_fleet_that_was_idle_believes_its_rates_as_before() -> None:
    rates = {"p1": Measured(4.0, 4_096), "d1": Measured(1.0, 4_096)}
    later = [worker(name, load=rate.load(10 * LASTS_S[1])) for name, rate in rates.items()]
    assert place(query(200), later, WEIGHTS).names == ("d1", "")


# A worker that was started again --------------------------------------------------------------------------------------


def test_a_new_prefill_worker_is_taken_to_be_like_the_other_and_not_like_decode_workers() -> None:
    """Those compute rests of prompts, of which each token takes longer."""
    rests = Load(prefill_ms_per_token=1.0, decode_step_ms=STEP_MS)
    fleet = [worker(f"d{number}", decoding=3, load=rests) for number in range(3)]
    for new in (Load(), Load(prefill_ms_per_token=7.0, prefill_doubt=0.6)):
        known = worker("p1", load=Load(prefill_ms_per_token=0.1), queue_ms=10.0)
        assert place(query(), [known, worker("p2", load=new), *fleet], WEIGHTS).names[1] == "p2"


def test_the_only_prefill_worker_is_taken_to_be_like_decode_workers_until_it_knows() -> None:
    fleet = [worker("p1", load=Load(prefill_ms_per_token=7.0, prefill_doubt=0.6)), worker("d1", decoding=1)]
    assert place(query(), fleet, WEIGHTS).names == ("d1", "p1")
