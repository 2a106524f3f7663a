"""What routers remember of placements that no report shows yet, and tell each other."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import cast

import numpy as np
import pytest
from redis.asyncio import Redis

from services.router import policy
from services.router.candidate import Candidate, Query, Weights
from services.router.fleet import Fleet
from services.router.placements import Placements
from services.router.predictions import GRACE_S, MAX_AHEAD_S, Predictions, marks, places
from services.router.table import Table
from shared.blackboard.board import Blackboard
from shared.blackboard.placements import Placement, PlacementBoard
from shared.blackboard.records import Registration
from tests.unit.fleets import PAGE_SIZE, registration

WEIGHTS = Weights()
NO_BOARD, NO_PLACEMENTS = cast("Blackboard", None), cast("PlacementBoard", None)
D1, D2 = ("d1", 1), ("d2", 1)
ROWS = {D1: 0, D2: 1}
FAR_AWAY_S = 1_000.0


def prompt(num_pages: int, seed: int = 0) -> bytes:
    """Page hashes; prompts of one seed begin alike."""
    return b"".join(random.Random(f"{seed} {page}").randbytes(16) for page in range(num_pages))


class World:
    """A router whose time the test makes, and whose index knows of no page."""

    def __init__(self, *registrations: Registration, board: PlacementBoard = NO_PLACEMENTS, name: str = "r1") -> None:
        self.now = 1_000.0
        self.fleet = Fleet(NO_BOARD, WEIGHTS, heartbeat_ms=500, ttl_ms=2_000, clock=lambda: self.now)
        self.fleet.observe(registrations)
        self.placements = Placements(self.fleet, board, name, clock=lambda: self.now)

    def table(self, pages: bytes) -> Table:
        roster = self.fleet.roster("m")
        stored = np.zeros(len(roster.incarnations), np.int64)
        return self.fleet.table(roster, stored, self.placements.expected(roster, pages, stored))

    def look(self, pages: bytes, num_tokens: int = 0, *, weights: Weights = WEIGHTS) -> Candidate:
        """Where a prompt with these pages would go."""
        asked = Query("r", "m", num_tokens or len(pages) // 16 * PAGE_SIZE + 1, affinity=pages[:16])
        return policy.place(asked, self.table(pages), weights)

    def place(self, pages: bytes, num_tokens: int = 0) -> Candidate:
        chosen = self.look(pages, num_tokens)
        self.placements.record(pages, chosen)
        return chosen


# Marks ----------------------------------------------------------------------------------------------------------------


def test_places_of_marks_are_equal_in_all_prompts_but_for_the_last_one() -> None:
    for short, long in ((7, 9), (40, 41), (64, 200), (500, 1_000)):
        assert places(long)[: len(places(short)) - 1] == places(short)[:-1]


def test_few_marks_stand_for_many_pages() -> None:
    assert [len(places(number)) for number in (0, 1, 8, 9, 64, 1_000)] == [0, 1, 1, 2, 8, 23]
    assert all(places(number)[-1] == number - 1 for number in (1, 8, 63, 64, 65, 1_000))


# Predictions ----------------------------------------------------------------------------------------------------------


def expected(predictions: Predictions, pages: bytes, now: float = 0.0) -> list[int]:
    return [int(number) for number in predictions.raise_runs(np.zeros(2, np.int64), pages, ROWS, now)]


def test_a_predicted_prompt_counts_as_cached_on_its_worker_alone() -> None:
    predictions = Predictions()
    predictions.add(marks(prompt(37)), {D1: 0.0}, 1.0, 0.0)
    assert expected(predictions, prompt(37)) == [37, 0]
    assert expected(predictions, prompt(37, seed=1)) == [0, 0]


def test_prompts_that_begin_alike_share_what_they_share_up_to_a_mark() -> None:
    predictions = Predictions()
    predictions.add(marks(prompt(20) + prompt(20, seed=1)), {D1: 0.0}, 1.0, 0.0)
    assert expected(predictions, prompt(20) + prompt(9, seed=2)) == [16, 0]
    assert expected(predictions, prompt(12)) == [8, 0]
    assert expected(predictions, prompt(20) + prompt(15, seed=1)) == [32, 0]


def test_what_the_index_knows_is_never_lowered() -> None:
    predictions = Predictions()
    predictions.add(marks(prompt(16)), {D1: 0.0}, 1.0, 0.0)
    assert list(predictions.raise_runs(np.array([30, 3]), prompt(40), ROWS, 0.0)) == [30, 3]


def test_a_prediction_holds_from_its_beginning_until_the_index_must_have_told() -> None:
    predictions = Predictions()
    predictions.add(marks(prompt(16)), {D1: 0.5}, 1.0, 0.0)
    times = (0.4, 0.5, 1.0 + GRACE_S - 0.1, 1.0 + GRACE_S)
    assert [expected(predictions, prompt(16), now)[0] for now in times] == [0, 16, 16, 0]


def test_nothing_is_left_of_predictions_that_are_over() -> None:
    predictions = Predictions()
    for number in range(100):
        predictions.add(marks(prompt(5) + prompt(50, seed=number)), {D1: 0.0}, number / 10, 0.0)
    assert len(predictions) > 100
    predictions.forget(10.0 + GRACE_S)
    assert len(predictions) == 0


def test_a_later_prediction_of_the_same_pages_outlives_the_earlier_one() -> None:
    predictions = Predictions()
    predictions.add(marks(prompt(16)), {D1: 0.0}, 1.0, 0.0)
    predictions.add(marks(prompt(16)), {D1: 0.0}, 5.0, 0.0)
    assert expected(predictions, prompt(16), 1.0 + GRACE_S) == [16, 0]


def test_what_lies_too_far_ahead_is_not_predicted() -> None:
    predictions = Predictions()
    predictions.add(marks(prompt(16)), {D1: 0.0}, MAX_AHEAD_S, 0.0)
    assert expected(predictions, prompt(16)) == [0, 0]


# Placing --------------------------------------------------------------------------------------------------------------


def test_a_burst_of_prompts_that_begin_alike_follows_the_first_until_waiting_costs_more_than_the_prefix_saves() -> None:
    world = World(*(registration(f"d{number}") for number in range(4)))
    chosen = []
    for number in range(1, 9):
        chosen.append(world.place(prompt(40) + prompt(10, seed=number)))
        world.now += 0.1  # a quarter of what the first one takes
    names = [one.names[0] for one in chosen]
    assert names[0] == names[1]  # 640 of 800 tokens saved, at the price of what is left of a queue
    assert chosen[1].num_cached_tokens == 40 * PAGE_SIZE
    assert len(set(names)) > 1  # but not all of them on one


def test_prompts_that_share_nothing_spread_as_if_nothing_were_predicted() -> None:
    world = World(*(registration(f"d{number}") for number in range(4)))
    names = [world.place(prompt(50, seed=number)).names[0] for number in range(8)]
    assert sorted(map(names.count, set(names))) == [2, 2, 2, 2]


def test_a_prediction_that_never_comes_true_is_forgotten() -> None:
    world = World(registration("d1"), registration("d2"))
    world.place(prompt(100))
    assert world.look(prompt(100)).num_cached_tokens == 100 * PAGE_SIZE
    world.now += GRACE_S + 1.0
    assert world.look(prompt(100)).num_cached_tokens == 0


def test_a_worker_that_started_again_has_nothing_of_what_was_placed_on_its_former_life() -> None:
    world = World(registration("d1"))
    world.place(prompt(50))
    world.fleet.observe([registration("d1", epoch=2)])
    assert world.look(prompt(50)).num_cached_tokens == 0


def test_who_only_decodes_has_a_prompts_pages_once_the_prefill_worker_has_computed_them() -> None:
    world = World(registration("p1"), registration("d1"))
    assert world.place(prompt(50)).names == ("d1", "p1")
    rows = {name: row for row, (name, _) in enumerate(world.fleet.roster("m").incarnations)}
    assert [world.table(prompt(50)).num_cached_pages[rows[name]] for name in ("p1", "d1")] == [50, 0]
    world.now += 0.5
    assert world.table(prompt(50)).num_cached_pages[rows["d1"]] == 50


def test_pages_that_are_only_predicted_are_not_pulled() -> None:
    world = World(registration("d1"), registration("d2"))
    placed = world.place(prompt(50)).names[0]
    world.fleet.note((placed, 1), (placed, 1), 9_000)
    other = world.look(prompt(50))
    assert other.names[0] != placed
    assert other.source is None


# Between routers ------------------------------------------------------------------------------------------------------


@pytest.fixture
async def two(valkey_url: str) -> AsyncIterator[tuple[World, World]]:
    """Routers that see the same workers and hear each other."""
    boards = [Blackboard(valkey_url), Blackboard(valkey_url)]
    fleet = [registration("d1"), registration("d2")]
    worlds = [
        World(*fleet, board=board.placements, name=name) for board, name in zip(boards, ("r1", "r2"), strict=True)
    ]
    running = [asyncio.create_task(world.placements.run()) for world in worlds]
    await heard_by(boards[0], 2)
    yield worlds[0], worlds[1]
    for task in running:
        task.cancel()
    await asyncio.wait(running)
    for board in boards:
        await board.close()


async def heard_by(board: Blackboard, count: int) -> None:
    """Wait until so many listen."""
    async with asyncio.timeout(10):
        nobody = Placement(computing=("x", 1), decode=("x", 1), prefill_ms=0)
        while await board.placements.announce("test", [nobody]) < count:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


async def until_expected(world: World, pages: bytes) -> None:
    async with asyncio.timeout(10):
        while not world.look(pages).num_cached_tokens:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


async def test_a_router_follows_what_another_one_predicted(two: tuple[World, World]) -> None:
    first, second = two
    placed = first.place(prompt(100))
    await until_expected(second, prompt(100))
    assert second.look(prompt(100)).names == placed.names
    assert second.table(prompt(100)).queue_ms.max() == pytest.approx(1_600 * 0.5 + 0.5, rel=0.01)
    assert second.table(prompt(100)).num_decoding.sum() == 1


async def test_a_router_does_not_count_its_own_placements_twice(two: tuple[World, World]) -> None:
    first, second = two
    first.place(prompt(100))
    await until_expected(second, prompt(100))
    second.place(prompt(100, seed=1))  # its announcement comes behind the first one's
    await until_expected(first, prompt(100, seed=1))
    assert first.table(prompt(100)).num_decoding.sum() == 2


class Counted(PlacementBoard):
    """Counts what is said on it."""

    num_said = num_told = 0

    async def announce(self, router: str, placed: Sequence[Placement]) -> int:
        num_listening = await super().announce(router, placed)
        self.num_said += 1
        self.num_told += len(placed)
        return num_listening


async def test_a_router_that_is_alone_tells_nothing_and_one_that_comes_hears_what_is_new(valkey_url: str) -> None:
    async with Redis.from_url(valkey_url) as redis, asyncio.timeout(10):
        board, other = Counted(redis), PlacementBoard(redis)
        alone = World(registration("d1"), registration("d2"), board=board)
        running = asyncio.create_task(alone.placements.run())
        alone.place(prompt(20))
        while board.num_said < 2:  # noqa: ASYNC110 - that it listens, and whether anybody does; nothing tells
            await asyncio.sleep(0.01)
        assert board.num_told == 0
        alone.place(prompt(20, seed=1))
        async with other.listen("r2") as heard:
            await other.announce("r2", [])
            while not (told := await heard.wait(10)):
                pass
        assert [placed.marks for placed in told] == [b"".join(marks(prompt(20, seed=1))).hex()]
        running.cancel()
        await asyncio.wait({running})


async def test_what_cannot_be_understood_is_left_out(two: tuple[World, World], valkey_url: str) -> None:
    first, second = two
    board = Blackboard(valkey_url)
    broken = Placement(computing=("d1", 1), decode=("d1", 1), prefill_ms=1, marks="no hex")
    await board.placements.announce("r3", [broken])
    await board.close()
    first.place(prompt(50))
    first.place(prompt(50, seed=1))
    await heard_by_again(first, second)


async def heard_by_again(first: World, second: World) -> None:
    """A router that has been away for a moment hears what is said later."""
    async with asyncio.timeout(10):
        seed = 2
        while not second.look(prompt(50, seed=seed)).num_cached_tokens:
            seed += 1
            first.place(prompt(50, seed=seed))
            await asyncio.sleep(0.05)
