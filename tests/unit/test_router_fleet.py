"""The router's view of workers between two reports, with a clock that the test moves."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import pytest

from services.router import policy
from services.router.candidate import Weights, Worker
from services.router.fleet import UNREPORTED_HEARTBEATS, Fleet
from services.router.table import Table
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Load, Registration
from tests.unit.fleets import place, query, record, registration

WEIGHTS = Weights()
NO_BOARD = cast("Blackboard", None)
HEARTBEAT_MS, TTL_MS = 500, 2_000


@dataclass
class World:
    """A fleet whose time and reports the test makes."""

    now: float = 1_000.0

    def __post_init__(self) -> None:
        self.fleet = Fleet(NO_BOARD, WEIGHTS, heartbeat_ms=HEARTBEAT_MS, ttl_ms=TTL_MS, clock=lambda: self.now)

    def observe(self, *registrations: Registration) -> None:
        self.fleet.observe(registrations)

    def worker(self, name: str = "d1") -> Worker:
        return next(worker for worker in self.workers() if worker.name == name)

    def workers(self) -> list[Worker]:
        return self.table().workers()

    def table(self, cached: Mapping[str, int] | None = None) -> Table:
        """`cached` pages by worker."""
        roster = self.fleet.roster("m")
        pages = [(cached or {}).get(name, 0) for name, _ in roster.incarnations]
        return self.fleet.table(roster, np.array(pages, np.int64))

    def place(self, num_tokens: int) -> None:
        record(self.fleet, place(query(num_tokens), self.workers(), WEIGHTS))


@pytest.fixture
def world() -> World:
    return World()


def queued(num_tokens: int, num_steps: int = 0) -> Load:
    return Load(num_queued_tokens=num_tokens, prefill_ms_per_token=0.5, decode_step_ms=20.0, num_steps=num_steps)


def test_a_reported_queue_is_a_wait_that_passes_with_time(world: World) -> None:
    world.observe(registration("d1", load=queued(400)))
    assert world.worker().queue_ms == pytest.approx(200)
    world.now += 0.15
    assert world.worker().queue_ms == pytest.approx(50)
    world.now += 1
    assert world.worker().queue_ms == 0


def test_reading_the_same_report_again_does_not_start_its_queue_over(world: World) -> None:
    world.observe(registration("d1", load=queued(400)))
    world.now += 0.15
    world.observe(registration("d1", load=queued(400)))
    assert world.worker().queue_ms == pytest.approx(50)


def test_a_new_report_of_the_same_queue_starts_it_over(world: World) -> None:
    world.observe(registration("d1", load=queued(400, num_steps=1)))
    world.now += 0.15
    world.observe(registration("d1", load=queued(400, num_steps=2)))
    assert world.worker().queue_ms == pytest.approx(200)


def test_a_placement_counts_before_any_report_shows_it(world: World) -> None:
    world.observe(registration("d1"))
    world.place(100)
    world.place(100)
    assert world.worker().queue_ms == pytest.approx(100)
    assert world.worker().num_decoding == 2


def test_a_worker_that_has_had_time_for_its_placements_is_idle_again(world: World) -> None:
    world.observe(registration("d1"))
    world.place(100)
    world.now += 0.06
    assert world.worker().queue_ms == 0


def test_a_placed_sequence_is_left_to_the_reports_after_two_heartbeats(world: World) -> None:
    world.observe(registration("d1"))
    world.place(100)
    world.now += UNREPORTED_HEARTBEATS * HEARTBEAT_MS / 1000
    assert world.worker().num_decoding == 0


def test_a_placement_on_a_pair_counts_on_both_workers(world: World) -> None:
    world.observe(registration("p1"), registration("d1"))
    world.place(1_000)
    assert [world.worker(name).queue_ms for name in ("p1", "d1")] == [pytest.approx(500), 0]
    assert (world.worker("p1").num_decoding, world.worker("d1").num_decoding) == (0, 1)


def test_a_restarted_worker_has_no_queue_of_its_former_life(world: World) -> None:
    world.observe(registration("d1", epoch=1))
    placed = place(query(100), world.workers(), WEIGHTS)
    record(world.fleet, placed)
    world.observe(registration("d1", epoch=2))
    record(world.fleet, placed)
    assert (world.worker().queue_ms, world.worker().num_decoding) == (0, 0)


def test_missing_workers_are_kept_for_one_registration_lifetime_after_a_loss(world: World) -> None:
    world.observe(registration("d1"), registration("d2"))
    world.fleet.lose("gone")
    world.now += 60
    assert len(world.workers()) == 2
    world.observe(registration("d2"))
    assert [worker.name for worker in world.workers()] == ["d1", "d2"]
    world.now += TTL_MS / 1000
    world.observe(registration("d2"))
    assert [worker.name for worker in world.workers()] == ["d2"]


def test_without_a_loss_a_missing_worker_leaves_at_once(world: World) -> None:
    world.observe(registration("d1"), registration("d2"))
    world.observe(registration("d2"))
    assert [worker.name for worker in world.workers()] == ["d2"]


def test_models_that_nobody_serves_leave_nothing_behind(world: World) -> None:
    world.observe(registration("d1"))
    for number in range(100):
        assert world.fleet.roster(f"no model {number}").incarnations == []
    world.observe(registration("d1"))
    assert len(world.fleet._rosters) == 0
    assert len(world.workers()) == 1


def test_a_process_without_a_model_card_is_no_worker(world: World) -> None:
    world.observe(registration("d1", card=None))
    assert world.workers() == []


def test_a_conversations_next_turn_goes_where_its_prefix_is_though_it_was_placed_there_just_now(
    world: World,
) -> None:
    world.observe(registration("d1"), registration("d2"))
    first = place(query(300), world.workers(), WEIGHTS)
    record(world.fleet, first)
    assert first.decode is not None
    world.now += 0.16
    alone = replace(WEIGHTS, min_pull_tokens=1_000)
    second = policy.place(query(310), world.table({first.decode.name: 18}), alone)
    assert second.names == first.names


def test_a_placed_sequence_is_left_to_the_report_that_says_it_came(world: World) -> None:
    world.observe(registration("d1", load=Load(num_requests=7)))
    for _ in range(3):
        world.place(100)
    world.observe(registration("d1", load=Load(num_inside=2, num_requests=9)))
    assert world.worker().num_decoding == 2 + 1
    world.place(100)
    world.now += UNREPORTED_HEARTBEATS * HEARTBEAT_MS / 1000
    assert world.worker().num_decoding == 2


def test_a_request_whose_prompt_is_computed_elsewhere_counts_where_it_will_decode(world: World) -> None:
    world.observe(registration("d1", load=Load(num_running=1, num_inside=3)))
    assert world.worker().num_decoding == 3


def test_a_worker_that_is_slower_than_its_rates_say_is_expected_to_be_so_within_bounds(world: World) -> None:
    rate = 0.5
    for ratio, factor in ((0.0, 1.0), (1.5, 1.5), (40.0, 2.0), (0.01, 0.5)):
        world.observe(registration("d1", load=Load(prefill_ms_per_token=rate, prompt_ratio=ratio, num_steps=1)))
        placed = place(query(100), world.workers(), WEIGHTS)
        assert dict(placed.terms)["prefill"] == pytest.approx(100 * rate * factor)
        assert placed.expected_ms == pytest.approx(100 * rate)  # what the worker is to compare with, or it would drift
        world.now += 60


def test_nobody_is_held_to_a_guess(world: World) -> None:
    world.observe(registration("d1", load=Load()))
    assert place(query(100), world.workers(), WEIGHTS).expected_ms == 0.0


def test_a_slow_workers_queue_is_longer_too(world: World) -> None:
    world.observe(registration("d1", load=Load(num_queued_tokens=400, prefill_ms_per_token=0.5, prompt_ratio=1.5)))
    assert world.worker().queue_ms == pytest.approx(300)


async def test_whoever_is_cancelled_as_workers_come_waits_no_more() -> None:
    world = World()
    waiting = asyncio.create_task(world.fleet.changed(60.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)  # it may wait in a task of its own
    world.observe(registration("d1"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
