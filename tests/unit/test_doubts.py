"""What a router makes of a gateway's word that it lost a worker."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest

from protos.forebay.v1 import kv_pb2
from services.router.candidate import Weights
from services.router.doubts import DEAF_S, REGISTERED_S, Doubts
from services.router.fleet import Fleet
from shared.errors import WorkerLost
from tests.unit.fleets import registration

PATIENCE_S = 10.0
FLEET = [registration("d0"), registration("d1"), registration("p0")]


class World:
    """A fleet of three workers, of which those that are `dead` do not answer."""

    def __init__(self) -> None:
        self.now = 0.0
        self.fleet = Fleet(cast("Any", None), Weights(), heartbeat_ms=500, ttl_ms=2_000, clock=lambda: self.now)
        self.doubts = Doubts(self.fleet, self.check, lambda: self.now, retry_s=0.001)
        self.dead: set[str] = set()
        self.asked: list[str] = []
        self.fleet.observe(FLEET)

    async def check(self, address: str, timeout_ms: int) -> None:
        assert timeout_ms > 0
        self.asked.append(address)
        if address in self.dead:
            raise WorkerLost("refused")

    def lose(self, name: str, epoch: int = 1, address: str = "127.0.0.1:1") -> None:
        """A gateway says so."""
        self.doubts.hear([kv_pb2.WorkerRef(worker_id=name, epoch=epoch, address=address)])

    @property
    def seen(self) -> list[str]:
        """Who is in question for a request."""
        return [name for name, _ in self.fleet.roster("m").incarnations]

    async def until_seen(self, *names: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while sorted(self.seen) != sorted(names):
                await self.fleet.changed(PATIENCE_S)

    async def until_asked(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.asked) < count:  # noqa: ASYNC110 - nobody tells of a question
                await asyncio.sleep(0.001)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    task = asyncio.create_task(world.doubts.run())
    yield world
    task.cancel()
    await asyncio.wait({task})


def address_of(name: str) -> str:
    return registration(name).address


async def test_nothing_is_placed_on_a_lost_worker_until_it_answers_where_it_registered(world: World) -> None:
    world.dead = {address_of("d0")}
    world.lose("d0", address="127.0.0.1:1")
    assert sorted(world.seen) == ["d1", "p0"]
    await world.until_asked(3)
    assert set(world.asked) == {address_of("d0")}
    assert sorted(world.seen) == ["d1", "p0"]
    world.dead.clear()
    await world.until_seen("d0", "d1", "p0")


async def test_a_heartbeat_alone_does_not_bring_a_lost_worker_back(world: World) -> None:
    world.dead = {address_of("p0")}
    world.lose("p0")
    world.fleet.observe([*FLEET[:2], registration("p0", num_beats=9)])
    assert sorted(world.seen) == ["d0", "d1"]


async def test_a_worker_that_was_started_again_is_not_doubted_for_its_past(world: World) -> None:
    world.dead = {address_of("d0")}
    world.lose("d0")
    world.fleet.observe([registration("d0", epoch=2), *FLEET[1:]])
    assert sorted(world.seen) == ["d0", "d1", "p0"]
    world.lose("d0", epoch=1)
    assert sorted(world.seen) == ["d0", "d1", "p0"]


async def test_a_worker_that_has_gone_is_asked_no_more(world: World) -> None:
    world.dead = {address_of("d0")}
    world.lose("d0")
    await world.until_asked(1)
    world.fleet.observe(FLEET[1:])
    num_asked = len(world.asked)
    world.dead = {address_of("d1")}
    world.lose("d1")
    await world.until_asked(num_asked + 4)
    assert world.asked[num_asked + 1 :].count(address_of("d0")) == 0


async def test_a_worker_that_stays_registered_is_trusted_though_it_cannot_be_reached(world: World) -> None:
    world.dead = {address_of("d0")}
    world.lose("d0")
    await world.until_asked(1)
    assert "d0" not in world.seen
    world.now += REGISTERED_S
    await world.until_seen("d0", "d1", "p0")


async def test_who_lies_of_a_worker_is_not_listened_to_for_a_while(world: World) -> None:
    world.lose("d1")
    assert "d1" not in world.seen
    await world.until_seen("d0", "d1", "p0")
    for _ in range(3):
        world.lose("d1")
    assert "d1" in world.seen
    assert len(world.asked) == 1
    world.now += DEAF_S
    world.lose("d1")
    assert "d1" not in world.seen


async def test_a_worker_is_asked_once_at_a_time(world: World) -> None:
    for _ in range(5):
        world.lose("d0")
    await world.until_seen("d0", "d1", "p0")
    assert world.asked == [address_of("d0")]


async def test_a_placement_made_a_moment_before_the_doubt_does_no_harm(world: World) -> None:
    incarnation = ("d0", 1)
    world.dead = {address_of("d0")}
    world.lose("d0")
    world.fleet.roster("m")
    world.fleet.note(incarnation, incarnation, 10.0)
    assert "d0" not in world.seen
