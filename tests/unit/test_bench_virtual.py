"""The cluster in virtual time that the placement benchmark can use in place of processes."""

import asyncio
from dataclasses import replace

import pytest

from bench.placement.figures import figures
from bench.placement.harness import Fleet
from bench.placement.virtual import loop
from bench.placement.virtual.cluster import run
from bench.placement.workloads import Agents, Conversation, Turn, agents, singles
from bench.serve.measures import tpot_ms, ttft_ms

WORKER = "--sim-prefill-ms-per-token 1 --sim-decode-ms 20 --sim-decode-ms-per-sequence 1 --max-step-tokens 128"
ALONE = Fleet(num_decode=1, num_pages=256, worker_flags=WORKER)
FOUR = replace(ALONE, num_decode=4)
SMALL = Agents(rate=4.0, duration_s=8.0, num_tenants=4, system_tokens=256, seed=3)


def said(*lengths: int, starts_s: float = 0.0, output: int = 5, pause_s: float = 0.0) -> Conversation:
    """A conversation whose turns add so many tokens each."""
    turns = [
        Turn(tuple(range(100 + number, 100 + number + length)), output, pause_s)
        for number, length in enumerate(lengths)
    ]
    return Conversation(starts_s, tuple(turns))


def test_time_passes_only_when_everybody_waits() -> None:
    async def sleep_in_turns() -> list[tuple[float, str]]:
        woken = list[tuple[float, str]]()

        async def sleeper(name: str, pause_s: float) -> None:
            for _ in range(2):
                await asyncio.sleep(pause_s)
                woken.append((loop.now_s(), name))

        await asyncio.gather(sleeper("hour", 3600.0), sleeper("day", 86_400.0))
        return woken

    assert loop.run(sleep_in_turns()) == [(3600, "hour"), (7200, "hour"), (86_400, "day"), (172_800, "day")]


def test_a_wait_that_nothing_would_end_is_an_error() -> None:
    async def wait() -> None:
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="none would ever come"):
        loop.run(wait())


def test_a_request_alone_takes_what_its_steps_take_and_the_way_there_and_back() -> None:
    (sent,) = run(ALONE, [said(300)]).sent
    assert ttft_ms(sent.answer) == pytest.approx(300 + 10)
    assert tpot_ms(sent.answer) == pytest.approx(20 + 1)
    assert len(sent.output) == 5


def test_the_next_turn_finds_the_one_before_and_its_answer_but_for_the_last_page() -> None:
    first, second = run(ALONE, [said(300, 40, pause_s=1.0)]).sent
    assert (first.answer.num_cached, second.answer.num_cached) == (0, 304)
    assert ttft_ms(second.answer) == pytest.approx(345 - 304 + 10)


def test_a_prompt_that_is_handed_over_is_computed_there_and_generated_here() -> None:
    fleet = replace(ALONE, num_prefill=1, router_flags="--remote-prefill-min-tokens 1")
    run_of_two = run(fleet, [said(300), said(300, starts_s=0.1)])
    first, second = run_of_two.sent
    assert first.output == second.output
    assert tpot_ms(first.answer) < 30  # the second prompt holds nobody up


def test_what_a_peer_has_is_pulled_from_it() -> None:
    """Two at once are computed by two workers; what one of them has, the other reads."""
    fleet = replace(ALONE, num_decode=2, router_flags="--policy round-robin")
    cached = [one.answer.num_cached for one in run(fleet, [said(300), said(300, starts_s=2.0)]).sent]
    assert cached == [0, 288]


def test_a_seed_gives_the_same_run_again() -> None:
    first, second = (run(FOUR, agents(SMALL)) for _ in range(2))
    assert first == second
    assert len(first.sent) > 20


def test_routers_that_share_requests_tell_each_other_and_find_nearly_as_much() -> None:
    one, four = (run(replace(FOUR, num_routers=number), agents(SMALL)) for number in (1, 4))
    rates = [figures(each, FOUR.total_pages).hit_rate for each in (one, four)]
    assert one != four
    assert rates[1] > 0.9 * rates[0]


def test_requests_without_room_wait_their_turn() -> None:
    crowd = singles(40.0, 1.0, 128, 8, seed=1)
    found = figures(run(ALONE, crowd), ALONE.total_pages)
    assert (found.num_requests, found.num_failed) == (len(crowd), 0)
    assert found.ttft_p90 > 128 * len(crowd) / 2
