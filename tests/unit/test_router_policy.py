"""The router's policy, as sentences about hand-made fleets."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from services.router import policy
from services.router.candidate import Candidate, Query, Weights, Worker
from services.router.config import RouterConfig
from services.router.table import Table
from shared.blackboard.records import Load, Pages
from shared.errors import ContextTooLong, NoWorker
from tests.unit.fleets import card, place, query, worker

WEIGHTS = Weights()


def where(workers: list[Worker], asked: Query | None = None, **weights: Any) -> tuple[str, str]:
    """Names of the chosen decode and prefill worker."""
    return place(asked or query(), workers, Weights(**weights)).names


def explain(asked: Query, workers: list[Worker], weights: Weights) -> list[Candidate]:
    return policy.explain(asked, Table.of(workers, weights), weights)


def terms(candidate: Candidate) -> dict[str, float]:
    return dict(candidate.terms)


# Which kind of placement ----------------------------------------------------------------------------------------------


def test_a_long_prompt_is_prefilled_on_a_prefill_worker() -> None:
    assert where([worker("p1"), worker("d1")]) == ("d1", "p1")


def test_a_short_prompt_is_prefilled_on_its_decode_worker() -> None:
    limit, busy = WEIGHTS.local_prefill_max_tokens, worker("d1", decoding=5)
    assert where([worker("p1"), busy], query(limit)) == ("d1", "")
    assert where([worker("p1"), busy], query(limit + 1)) == ("d1", "p1")


def test_a_prompt_that_takes_no_longer_than_a_handoff_stays_where_nobody_is_held_up_by_it() -> None:
    assert where([worker("p1"), worker("d1")], query(17)) == ("d1", "")
    assert where([worker("p1"), worker("d1")], query(100)) == ("d1", "p1")


def test_only_the_uncached_part_counts_as_long() -> None:
    assert where([worker("p1"), worker("d1", cached=60)], query(1_000)) == ("d1", "")


def test_the_threshold_is_configurable() -> None:
    fleet = [worker("p1"), worker("d1", decoding=20)]
    assert where(fleet, query(10), local_prefill_max_tokens=0) == ("d1", "p1")
    assert where(fleet, query(5_000), local_prefill_max_tokens=8_000) == ("d1", "")


def test_without_prefill_workers_decode_workers_prefill() -> None:
    assert where([worker("d1")]) == ("d1", "")


def test_when_every_prefill_worker_is_refused_decode_workers_prefill() -> None:
    fleet = [worker("p1", draining=True), worker("p3"), worker("d1")]
    assert where(fleet, query(excluded=("p3",))) == ("d1", "")


def test_workers_that_cannot_exchange_pages_are_never_paired() -> None:
    other = card(compatibility_hash="other")
    assert where([worker("p1", model=other), worker("d1")]) == ("d1", "")
    mixed = [
        worker("p1", model=other),
        worker("p2", queue_ms=5_000),
        worker("d1"),
        worker("d2", model=other, decoding=1),
    ]
    assert where(mixed) == ("d2", "p1")


# Who may take part ----------------------------------------------------------------------------------------------------


def test_a_worker_that_takes_no_work_gets_none() -> None:
    assert where([worker("d1", draining=True), worker("d2", decoding=50)]) == ("d2", "")


def test_a_worker_that_failed_the_request_is_not_asked_again() -> None:
    assert where([worker("d1"), worker("d2", decoding=50)], query(excluded=("d1",))) == ("d2", "")


def test_a_worker_whose_whole_pool_is_too_small_is_not_asked() -> None:
    small = worker("d1", pages=Pages(free=10, total=10))
    assert where([small, worker("d2", decoding=50)]) == ("d2", "")
    assert where([small], query(10 * 16 - 1)) == ("d1", "")
    with pytest.raises(ContextTooLong):
        where([small], query(10 * 16))


def test_a_prompt_longer_than_every_context_is_the_requests_fault() -> None:
    assert where([worker("d1", model=card(max_model_len=1_001))]) == ("d1", "")
    with pytest.raises(ContextTooLong):
        where([worker("d1", model=card(max_model_len=1_000))])


def test_prefill_workers_alone_are_no_fleet() -> None:
    with pytest.raises(NoWorker, match="no decode worker"):
        where([worker("p1")])


def test_the_fault_names_every_reason() -> None:
    with pytest.raises(NoWorker, match=r"d1: draining; d2: already failed this request"):
        where([worker("d1", draining=True), worker("d2")], query(excluded=("d2",)))


# Which worker ---------------------------------------------------------------------------------------------------------


def test_the_longest_cached_prefix_wins_among_idle_workers() -> None:
    assert where([worker("d1", cached=5), worker("d2", cached=40), worker("d3")]) == ("d2", "")
    assert where([worker("p1", cached=5), worker("p2", cached=40), worker("d1")]) == ("d1", "p2")


def test_a_queue_that_takes_longer_than_the_cached_prefix_saves_loses() -> None:
    saved_ms = 40 * 16 * 0.5
    for queue_ms, winner in ((saved_ms - 50, "p1"), (saved_ms + 50, "p2")):
        fleet = [worker("p1", cached=40, queue_ms=queue_ms), worker("p2"), worker("d1")]
        assert where(fleet, min_pull_tokens=10_000) == ("d1", winner)


def test_measured_rates_decide_between_fast_and_slow_workers() -> None:
    slow, fast = Load(prefill_ms_per_token=0.5), Load(prefill_ms_per_token=0.1)
    assert where([worker("p1", load=slow), worker("p2", load=fast, queue_ms=300), worker("d1")]) == ("d1", "p2")


def test_a_worker_that_has_measured_nothing_is_taken_to_be_like_its_peers() -> None:
    slow, new = Load(prefill_ms_per_token=2.0, prefill_ms_per_pair=0.001), Load()
    stranger = worker("d2", model=card(compatibility_hash="other"), load=new)
    table = Table.of([worker("p1", load=slow), worker("d1", load=new), stranger], WEIGHTS)
    assert list(table.facts.prefill_ms) == [2.0, 2.0, WEIGHTS.default_prefill_ms_per_token]
    assert list(table.facts.attention_ms) == [0.001, 0.001, 0.0]


def test_decodes_go_where_fewer_sequences_run() -> None:
    assert where([worker("p1"), worker("d1", decoding=3), worker("d2", decoding=2)]) == ("d2", "p1")


def test_a_local_prefill_avoids_the_decodes_it_would_stall() -> None:
    busy, idle = worker("d1", decoding=4), worker("d2", decoding=0, queue_ms=30)
    assert where([busy, idle], query(100)) == ("d2", "")
    assert where([busy, idle], query(100), load_weight=0.0) == ("d2", "")
    assert where([busy, idle], query(100), stall_weight=0.0, load_weight=0.0) == ("d2", "")  # steps of d1 take as long
    waits = worker("d2", decoding=0, queue_ms=31)
    assert where([busy, waits], query(100), stall_weight=0.0, load_weight=0.0, tie_ms=0.0) == ("d1", "")


def test_a_remote_prefill_avoids_a_decode_worker_that_has_prompts_of_its_own_to_compute() -> None:
    assert where([worker("p1"), worker("d1", queue_ms=90), worker("d2", decoding=1)]) == ("d2", "p1")


def test_a_worker_with_room_is_preferred_to_one_that_must_evict_or_wait() -> None:
    evicting = worker("d1", pages=Pages(free=0, cached=1_000, total=1_000))
    waiting = worker("d2", pages=Pages(free=0, held=1_000, total=1_000))
    roomy = worker("d3")
    costs = [terms(place(query(), [each], WEIGHTS))["kv"] for each in (roomy, evicting, waiting)]
    assert costs == sorted(set(costs))
    assert costs[0] == 0


def test_pages_that_the_prompt_will_reuse_are_not_evicted() -> None:
    cached = worker("d1", cached=62, pages=Pages(free=9, cached=62, total=100))
    assert terms(place(query(), [cached], WEIGHTS))["kv"] == 0  # 62 there, 9 for the last token and the output


def test_pages_that_can_neither_be_reused_nor_evicted_must_be_waited_for() -> None:
    full = worker("d1", cached=50, pages=Pages(free=0, cached=62, held=38, total=100))
    evicted_ms, num_missing = 12 * 16 * 0.5, 9  # 71 pages for prompt and output, of which 50 are there
    kv_ms = terms(place(query(), [full], WEIGHTS))["kv"]
    assert kv_ms == pytest.approx(WEIGHTS.eviction_weight * evicted_ms + num_missing * WEIGHTS.missing_page_ms)


def test_only_the_last_chunk_of_a_transfer_costs_anything() -> None:
    short, long = (terms(place(query(tokens), [worker("p1"), worker("d1")], WEIGHTS)) for tokens in (600, 6_000))
    assert short["transfer"] == long["transfer"] == WEIGHTS.handoff_ms + WEIGHTS.chunk_tokens * 1_000 / 1e6


def test_equal_workers_share_the_requests() -> None:
    fleet = [worker(f"d{number}") for number in range(4)]
    chosen = Counter(where(fleet, query(affinity=bytes([number])))[0] for number in range(200))
    assert set(chosen) == {"d0", "d1", "d2", "d3"}
    assert min(chosen.values()) > 25


def test_prompts_that_begin_alike_meet_on_one_worker_whatever_the_order_of_the_fleet() -> None:
    fleet = [worker(f"d{number}") for number in range(4)]
    assert len({where(fleet[turn:] + fleet[:turn]) for turn in range(4)}) == 1


def test_losing_a_worker_moves_only_its_own_prompts() -> None:
    fleet = [worker(f"d{number}") for number in range(4)]
    for number in range(50):
        before = where(fleet, query(affinity=bytes([number])))
        after = where(fleet[1:], query(affinity=bytes([number])))
        assert before in (after, ("d0", ""))


def test_the_second_choice_for_the_prompt_is_the_next_cheapest_that_can_exchange_pages() -> None:
    stranger = worker("p4", model=card(compatibility_hash="other"))
    fleet = [worker("p1", queue_ms=50), worker("p2", queue_ms=900), worker("p3", queue_ms=90), stranger, worker("d1")]
    placed = place(query(), fleet, WEIGHTS)
    assert placed.names == ("d1", "p1")
    assert placed.second_prefill == fleet[2]


def test_without_another_prefill_worker_there_is_no_second_choice() -> None:
    assert place(query(), [worker("p1"), worker("d1")], WEIGHTS).second_prefill is None
    assert place(query(10), [worker("p1"), worker("p2"), worker("d1")], WEIGHTS).second_prefill is None


# Pulling a prefix from a peer -----------------------------------------------------------------------------------------


def pulled_from(workers: list[Worker], **weights: Any) -> str:
    source = place(query(), workers, Weights(**weights)).source
    return source.name if source else ""


def test_a_long_prefix_that_only_the_decode_worker_has_is_pulled_by_the_prefill_worker() -> None:
    assert pulled_from([worker("p1"), worker("d1", cached=30)]) == "d1"


def test_a_short_prefix_is_pulled_if_that_is_faster_than_computing_it() -> None:
    slow, fast = (Load(prefill_ms_per_token=ms, decode_step_ms=20.0) for ms in (0.5, 0.05))
    for load, source in ((slow, "d1"), (fast, "")):
        assert pulled_from([worker("d1", cached=3, queue_ms=9_000, load=load), worker("d2", load=load)]) == source


def test_a_prefix_is_pulled_from_a_worker_that_is_too_busy_to_compute() -> None:
    assert pulled_from([worker("p1", cached=50, queue_ms=9_000), worker("p2"), worker("d1")]) == "p1"


def test_the_longest_of_several_prefixes_is_pulled() -> None:
    assert (
        pulled_from([worker("p1"), worker("d1", cached=30), worker("d2", cached=40), worker("d3", cached=20)]) == "d2"
    )


def test_a_pulled_prefix_counts_as_cached() -> None:
    assert place(query(), [worker("p1"), worker("d1", cached=30)], WEIGHTS).num_cached_tokens == 30 * 16


@pytest.mark.parametrize(
    ("source", "weights"),
    [
        (worker("d1", cached=1), {}),
        (worker("d1", cached=30), {"transfer_gb_per_s": 0.001}),
        (worker("d9", cached=50, model=card(compatibility_hash="other")), {}),
    ],
    ids=["hardly longer", "slower than computing", "incompatible"],
)
def test_a_prefix_that_is_not_worth_it_is_not_pulled(source: Worker, weights: dict[str, Any]) -> None:
    assert pulled_from([worker("p1"), worker("d1"), source], **weights) == ""


def test_nothing_is_pulled_from_a_worker_that_failed_the_request() -> None:
    fleet = [worker("p1", cached=50), worker("p2"), worker("d1")]
    assert place(query(excluded=("p1",)), fleet, WEIGHTS).source is None


def test_a_worker_that_refused_the_request_because_it_drains_can_be_pulled_from() -> None:
    fleet = [worker("p1"), worker("d1", cached=50, draining=True), worker("d2")]
    placed = place(query(excluded=("d1",)), fleet, WEIGHTS)
    assert placed.names == ("d2", "p1")
    assert placed.source == fleet[1]


# Counting -------------------------------------------------------------------------------------------------------------


def test_at_least_one_token_is_computed() -> None:
    placed = place(query(160), [worker("d1", cached=10)], WEIGHTS)
    assert placed.num_cached_tokens == 159


def test_a_worker_that_has_measured_nothing_is_given_the_default_rates() -> None:
    assert terms(place(query(100), [worker("d1", load=Load())], WEIGHTS))["prefill"] == 50.0


# Explaining -----------------------------------------------------------------------------------------------------------

FLEETS = {
    "pairs": [worker("p1", queue_ms=70), worker("p2", cached=9), worker("d1", decoding=2), worker("d2")],
    "mixed": [worker("p1"), worker("d1", cached=60), worker("d2"), worker("d3", draining=True)],
    "equal": [worker(name) for name in ("p1", "p2", "p3", "d1", "d2", "d3")],
    "local": [worker("d1"), worker("d2", queue_ms=3)],
    "incompatible": [worker("p1", model=card(compatibility_hash="x")), worker("d1"), worker("d2", draining=True)],
}


@pytest.mark.parametrize("fleet", FLEETS.values(), ids=FLEETS)
def test_explaining_puts_what_place_chooses_first(fleet: list[Worker]) -> None:
    for number in range(20):
        asked = query(affinity=bytes([number]))
        first, placed = explain(asked, fleet, WEIGHTS)[0], place(asked, fleet, WEIGHTS)
        assert first == placed
        assert first.terms == placed.terms


@pytest.mark.parametrize("fleet", FLEETS.values(), ids=FLEETS)
def test_nothing_possible_is_cheaper_than_what_is_chosen(fleet: list[Worker]) -> None:
    possible = [candidate for candidate in explain(query(), fleet, WEIGHTS) if not candidate.rejection]
    assert possible[0].cost_ms <= min(candidate.cost_ms for candidate in possible) + 2 * WEIGHTS.tie_ms


@pytest.mark.parametrize("fleet", FLEETS.values(), ids=FLEETS)
def test_every_worker_is_explained_and_the_rejected_come_last(fleet: list[Worker]) -> None:
    found = explain(query(), fleet, WEIGHTS)
    named = {worker.name for candidate in found for worker in (candidate.decode, candidate.prefill) if worker}
    assert named == {worker.name for worker in fleet}
    rejected = [bool(candidate.rejection) for candidate in found]
    assert rejected == sorted(rejected)


def test_rejections_have_reasons() -> None:
    fleet = [worker("p1"), worker("d1", cached=62), worker("d2"), worker("d3", draining=True)]
    found = explain(query(), fleet, WEIGHTS)
    reasons = {candidate.names: candidate.rejection for candidate in found if candidate.rejection}
    assert reasons[("d3", "")] == "draining"
    assert "little to compute" in reasons[("d1", "p1")]


def test_a_fleet_that_can_do_nothing_is_still_explained() -> None:
    assert [candidate.rejection for candidate in explain(query(), [worker("d1", draining=True)], WEIGHTS)] == [
        "draining"
    ]


def test_configuration_and_policy_have_the_same_defaults() -> None:
    assert RouterConfig.load([]).weights() == WEIGHTS


def ranked(workers: list[Worker], asked: Query) -> list[Candidate]:
    return list(policy.rank(asked, Table.of(workers, WEIGHTS), WEIGHTS))


def test_every_placement_is_ranked_once_the_chosen_first_and_then_by_cost() -> None:
    fleet = [worker("p1", queue_ms=900), worker("p2"), worker("d1"), worker("d2", decoding=9), worker("d3", decoding=4)]
    found = ranked(fleet, query())
    assert found[0] == place(query(), fleet, WEIGHTS)
    assert len({candidate.names for candidate in found}) == len(found) == 2 * 3 + 3
    assert [candidate.cost_ms for candidate in found] == sorted(candidate.cost_ms for candidate in found)


def test_of_many_equal_placements_each_is_ranked_once_too() -> None:
    fleet = [worker("d0"), *(worker(f"d{number}", queue_ms=500) for number in range(1, 60))]
    found = ranked(fleet, query())
    assert found[0].names == ("d0", "")
    assert len({candidate.names for candidate in found}) == len(found) == 60


def test_behind_the_pairs_every_decode_worker_is_offered_alone_should_no_prefill_worker_have_room() -> None:
    found = [candidate.names for candidate in ranked([worker("p1"), worker("d1"), worker("d2", decoding=1)], query())]
    assert found == [("d1", "p1"), ("d2", "p1"), ("d1", ""), ("d2", "")]


def test_what_is_left_of_a_ranking_goes_on_where_its_beginning_ended() -> None:
    table = Table.of([worker("p1"), worker("p2"), worker("d1"), worker("d2", decoding=1)], WEIGHTS)
    all_of_them = policy.rank(query(), table, WEIGHTS)
    assert [*all_of_them[:2], *all_of_them[2:]] == list(all_of_them)


@pytest.mark.parametrize(("num_prefill", "num_decode"), [(40, 3), (3, 100), (30, 30), (300, 1), (0, 300)])
def test_in_large_fleets_the_first_few_are_those_that_a_sorted_list_begins_with(
    num_prefill: int, num_decode: int
) -> None:
    fleet = [worker(f"{role}{number}", queue_ms=float(37 * number % 1_009), decoding=number % 7)
             for role, count in (("p", num_prefill), ("d", num_decode)) for number in range(count)]  # fmt: skip
    table = Table.of(fleet, replace(WEIGHTS, tie_ms=0.0))
    found = policy.rank(query(), table, replace(WEIGHTS, tie_ms=0.0))
    first = [found.scored.totals.reshape(-1)[number] for number in found.numbers(6)]
    assert first == sorted(found.scored.totals.reshape(-1))[:6]
    assert sorted(found.numbers()) == list(range((num_prefill + 1) * num_decode))


# Detours --------------------------------------------------------------------------------------------------------------

BUSY = [worker("d1"), worker("d2", queue_ms=100.0), worker("d3", queue_ms=400.0)]


@pytest.mark.parametrize(("limit_ms", "names"), [(math.inf, ["d1", "d2", "d3"]), (250.0, ["d1", "d2"]), (0.0, ["d1"])])
def test_no_placement_is_offered_that_costs_more_than_a_detour_may(limit_ms: float, names: list[str]) -> None:
    weights = replace(WEIGHTS, max_detour_ms=limit_ms)
    ranked = policy.rank(query(), Table.of(BUSY, weights), weights)
    assert [candidate.names[0] for candidate in ranked] == names
    assert len(ranked) == len(names)


def test_explaining_shows_what_is_too_long_a_detour_and_why() -> None:
    shown = explain(query(), BUSY, replace(WEIGHTS, max_detour_ms=250.0))
    assert [candidate.names[0] for candidate in shown] == ["d1", "d2", "d3"]
    assert [bool(candidate.rejection) for candidate in shown] == [False, False, True]
    assert "max_detour_ms" in shown[2].rejection
    assert shown[2].cost_ms > shown[1].cost_ms
