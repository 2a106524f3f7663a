"""Laws of the cost, held for random fleets, and what falls out of it: spreading, affinity, and when to disaggregate."""

import random
import sys
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from services.router.candidate import Weights, Worker
from services.router.config import RouterConfig
from services.router.cost import costs
from services.router.fleet import Fleet
from services.router.policy import place as place_on
from services.router.policy import rank
from services.router.rivals import RIVALS
from services.router.table import Table
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Load
from tests.unit.fleets import place, query, record, registration, worker

WEIGHTS = Weights()
NO_BOARD = cast("Blackboard", None)


def random_worker(chance: random.Random, name: str) -> Worker:
    load = Load(
        prefill_ms_per_token=chance.choice([0.0, 0.1, 1.0]),
        prefill_ms_per_pair=chance.choice([0.0, 1e-4]),
        decode_step_ms=chance.choice([0.0, 5.0, 40.0]),
        decode_ms_per_sequence=chance.choice([0.0, 0.5]),
        transfer_bytes_per_ms=chance.choice([0.0, 1e5, 1e7]),
        prefill_doubt=chance.choice([0.0, 0.5, 1.0]),
    )
    return worker(
        name,
        cached=chance.randrange(60),
        queue_ms=chance.choice([0.0, 300.0]),
        decoding=chance.randrange(20),
        load=load,
    )


def random_fleet(seed: int) -> list[Worker]:
    chance = random.Random(seed)
    return [random_worker(chance, name) for name in ("p1", "p2", "p3", "d1", "d2", "d3")]


def cheapest(workers: list[Worker]) -> float:
    """With nothing but the cost: a threshold that an operator sets is a step in it."""
    weights = Weights(tie_ms=0.0, local_prefill_max_tokens=0, min_pull_tokens=1)
    return place(query(), workers, weights).cost_ms


@pytest.mark.parametrize("seed", range(30))
def test_more_cache_never_costs_more(seed: int) -> None:
    fleet = random_fleet(seed)
    for row, changed in enumerate(fleet):
        richer = replace(changed, num_cached_pages=changed.num_cached_pages + 2)
        assert cheapest([*fleet[:row], richer, *fleet[row + 1 :]]) <= cheapest(fleet) + 1e-6


@pytest.mark.parametrize("seed", range(30))
def test_a_sequence_more_always_costs_something_whatever_was_measured(seed: int) -> None:
    table = Table.of(random_fleet(seed), WEIGHTS)
    busier = table._replace(num_decoding=table.num_decoding + 1)
    decodes = table.facts.decodes
    assert (costs(query(), busier, WEIGHTS).load > costs(query(), table, WEIGHTS).load)[decodes].all()


@pytest.mark.parametrize("seed", range(30))
def test_a_longer_queue_and_an_older_report_never_cost_less(seed: int) -> None:
    table = Table.of(random_fleet(seed), WEIGHTS)
    now = costs(query(), table, WEIGHTS)
    for worse in (table._replace(queue_ms=table.queue_ms + 10), table._replace(stale_ms=table.stale_ms + 10)):
        then = costs(query(), worse, WEIGHTS)
        for before, after in ((now.local, then.local), (now.remote, then.remote)):
            possible = np.isfinite(before)
            assert (after[possible] > before[possible]).all()


@pytest.mark.parametrize("seed", range(30))
def test_terms_add_up_to_what_was_compared(seed: int) -> None:
    scored = costs(query(), Table.of(random_fleet(seed), WEIGHTS), WEIGHTS)
    for prefill, decode in zip(*np.nonzero(np.isfinite(scored.remote)), strict=True):
        terms = scored.remote_terms(int(prefill), int(decode))
        assert sum(cost for _, cost in terms) == pytest.approx(scored.remote[prefill, decode])
    for decode in np.flatnonzero(np.isfinite(scored.local)):
        assert sum(cost for _, cost in scored.local_terms(int(decode))) == pytest.approx(scored.local[decode])


@pytest.mark.parametrize("policy", ["cost", *RIVALS])
def test_a_worker_that_is_excluded_or_draining_is_never_chosen(policy: str) -> None:
    for seed in range(20):
        fleet = random_fleet(seed)
        fleet[4] = replace(fleet[4], registration=fleet[4].registration.model_copy(update={"draining": True}))
        chosen = place(query(excluded=("p1", "d1")), fleet, Weights(policy=policy))
        assert not {"p1", "d1", "d2"} & set(chosen.names)


def test_a_hundred_equal_prompts_at_once_are_spread_by_what_they_take() -> None:
    """No worker gets more than its share and one, though the first that was placed is cached nowhere yet."""
    fleet = Fleet(NO_BOARD, WEIGHTS, heartbeat_ms=500, ttl_ms=2_000, clock=lambda: 0.0)
    names = [f"d{number}" for number in range(10)]
    fleet.observe([registration(name) for name in names])
    roster, chosen = fleet.roster("m"), []
    for _ in range(100):
        placed = place_on(query(), fleet.table(roster, np.zeros(10, np.int64)), WEIGHTS)
        record(fleet, placed)
        chosen.append(placed.names[0])
    assert sorted(map(chosen.count, names)) == [10] * 10


def test_a_prompt_is_prefilled_where_it_decodes_once_prefill_workers_are_slow_or_busy_enough() -> None:
    idle = worker("d1")
    slow = worker("p1", load=Load(prefill_ms_per_token=5.0))
    busy = worker("p1", queue_ms=5_000)
    assert place(query(), [slow, idle], WEIGHTS).names == ("d1", "")
    assert place(query(), [busy, idle], WEIGHTS).names == ("d1", "")
    assert place(query(), [worker("p1"), idle], WEIGHTS).names == ("d1", "p1")


def test_a_prefill_worker_whose_first_prompts_took_long_is_tried_again_once_nobody_knows_better() -> None:
    """Its kernels were compiled then; all prompts go elsewhere, and nothing would ever be measured there again."""

    def chosen(doubt: float) -> str:
        slow = worker("p1", load=Load(prefill_ms_per_token=2.0, prefill_doubt=doubt))
        quick = worker("d1", decoding=20, load=Load(prefill_ms_per_token=0.03, decode_step_ms=10.0))
        return place(query(8000), [slow, quick], WEIGHTS).names[1]

    assert [chosen(doubt) for doubt in (0.0, 0.9)] == ["", "p1"]


def test_in_doubt_a_rate_comes_near_that_of_those_who_know() -> None:
    def rates(doubt: float, doubt_of_peer: float) -> list[float]:
        own = worker("p1", load=Load(prefill_ms_per_token=4.0, prefill_doubt=doubt))
        peer = worker("d1", load=Load(prefill_ms_per_token=1.0, prefill_doubt=doubt_of_peer))
        return [float(rate) for rate in Table.of([own, peer], WEIGHTS).facts.prefill_ms]

    assert rates(0.0, 0.0) == [4.0, 1.0]
    assert rates(0.25, 0.0) == pytest.approx([4**0.5 * 2.5**0.5, 1.0])  # half as measured, half as the median of both
    assert rates(0.5, 0.0) == [1.0, 1.0]
    assert rates(0.9, 0.2) == [1.0, 1.0]
    assert rates(0.9, 0.9) == rates(1.0, 1.0) == [4.0, 1.0], "nobody knows better"


def test_running_decodes_are_worth_waiting_for_a_prefill_worker() -> None:
    busy = worker("p1", queue_ms=300)
    assert place(query(), [busy, worker("d1")], WEIGHTS).names == ("d1", "")
    assert place(query(), [busy, worker("d1", decoding=5)], WEIGHTS).names == ("d1", "p1")


def test_the_ceiling_holds_where_the_cost_would_say_otherwise() -> None:
    fleet = [worker("p1", queue_ms=60_000), worker("d1")]
    assert place(query(), fleet, Weights(remote_prefill_min_tokens=1_000)).names == ("d1", "p1")
    assert place(query(), fleet, Weights(remote_prefill_min_tokens=1_001)).names == ("d1", "")
    assert place(query(), fleet[1:], Weights(remote_prefill_min_tokens=1)).names == ("d1", "")


def test_a_transfer_is_hidden_by_computing_unless_it_takes_longer() -> None:
    def transfer_ms(bytes_per_ms: float) -> float:
        fleet = [worker("p1"), worker("d1", load=Load(transfer_bytes_per_ms=bytes_per_ms))]
        return dict(place(query(), fleet, Weights(min_stalled=100.0)).terms)["transfer"]

    fixed = WEIGHTS.handoff_ms
    assert transfer_ms(1e6) == pytest.approx(fixed + 0.512)
    assert transfer_ms(1e3) == pytest.approx(fixed + 1_000 - 488 * 0.5)


def test_tokens_deep_in_a_prompt_take_longer() -> None:
    rate = Load(prefill_ms_per_token=0.1, prefill_ms_per_pair=0.001)
    alone = dict(place(query(1_000), [worker("d1", load=rate)], WEIGHTS).terms)
    behind = dict(place(query(1_000), [worker("d1", load=rate, cached=50)], WEIGHTS).terms)
    assert alone["prefill"] == pytest.approx(100 + 500)
    assert behind["prefill"] == pytest.approx(20 + 0.001 * (1_000**2 - 800**2) / 2)


def test_each_rival_goes_by_its_own_thing() -> None:
    fleet = [worker("d1", cached=30, queue_ms=9_000), worker("d2", decoding=1), worker("d3", cached=9, queue_ms=500)]
    assert place(query(), fleet, Weights(policy="prefix")).names == ("d1", "")
    assert place(query(), fleet, Weights(policy="least-loaded")).names == ("d2", "")
    at_random = {place(query()._replace(request_id=str(n)), fleet, Weights(policy="random")).names for n in range(50)}
    assert len(at_random) == 3


@pytest.mark.parametrize("policy", RIVALS)
def test_a_rival_offers_workers_alone_behind_all_pairs_should_no_prefill_worker_have_room(policy: str) -> None:
    weights = Weights(policy=policy)
    fleet = [worker("p1"), worker("p2"), worker("d1"), worker("d2", decoding=1)]
    ways = [bool(each.prefill) for each in rank(query(), Table.of(fleet, weights), weights)]
    assert ways == [True] * 4 + [False] * 2


def test_round_robin_takes_turns() -> None:
    weights = Weights(policy="round-robin")
    fleet = Fleet(NO_BOARD, weights, heartbeat_ms=500, ttl_ms=2_000, clock=lambda: 0.0)
    fleet.observe([registration(name) for name in ("d1", "d2", "d3")])
    chosen = []
    for _ in range(6):
        placed = place_on(query(), fleet.table(fleet.roster("m"), np.zeros(3, np.int64)), weights)
        record(fleet, placed)
        chosen.append(placed.names[0])
    assert chosen[:3] == chosen[3:]
    assert set(chosen) == {"d1", "d2", "d3"}


def test_more_workers_take_more_arithmetic_and_no_more_calls() -> None:
    """All placements are weighed at once: nothing is done for each."""

    def num_calls(num_workers: int) -> int:
        fleet = [worker(f"{role}{n}", cached=n % 5, decoding=n % 3) for role in "pd" for n in range(num_workers)]
        table, calls = Table.of(fleet, WEIGHTS), list[str]()
        rank(query(), table, WEIGHTS)  # what is kept between requests is made now

        def count(_: Any, event: str, __: Any) -> None:
            if event in ("call", "c_call"):
                calls.append(event)

        sys.setprofile(count)
        try:
            rank(query(), table, WEIGHTS)
        finally:
            sys.setprofile(None)
        return len(calls)

    assert num_calls(200) <= num_calls(20)


def test_every_policy_can_be_configured() -> None:
    for policy in ("cost", *RIVALS):
        assert RouterConfig.load(["--policy", policy]).weights().policy == policy
