"""Requests that wait at a router: woken, refused, given up, and taken over by another router."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from protos.forebay.v1 import router_pb2
from services.router.admission import Limits
from shared import rpc
from shared.blackboard import keys
from shared.blackboard.records import Room
from shared.errors import DeadlineExceeded, Draining, Overloaded
from tests.unit.router_rig import TTL_MS, Router

ONE, FULL = Room(sequences=1, tokens=10_000, pages=10_000), Room(sequences=1)


async def has(router: Router, used: Room, *arrived: str) -> None:
    """The fleet's one worker, which takes one request at a time, says what it has."""
    await router.board.admission.report("m", "d1", 1, limits=ONE, used=used, arrived=arrived, ttl_ms=TTL_MS)


async def queued(router: Router, length: int) -> None:
    async with asyncio.timeout(10):
        while await router.admission.num_queued("m") != length:  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.005)


def ask(router: Router, name: str, **changes: Any) -> asyncio.Task[router_pb2.RouteResponse]:
    return asyncio.create_task(router.route(request_id=name, **changes))


@pytest.fixture
async def router(valkey_url: str) -> AsyncIterator[Router]:
    router = Router(valkey_url, limits=Limits(max_queued=3))
    await router.start()
    await router.fleet_of("d1")
    await has(router, FULL)
    yield router
    await router.admission.settled()
    await router.stop()


async def test_a_request_that_waits_is_placed_when_room_comes_free(router: Router) -> None:
    waiting = ask(router, "a")
    await queued(router, 1)
    await has(router, Room())
    assert (await waiting).placement.decode.worker_id == "d1"
    assert await router.admission.num_queued("m") == 0


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(router: Router) -> None:
    waiting = [ask(router, f"{number}") for number in range(3)]
    await queued(router, 3)
    with pytest.raises(Overloaded) as refused:
        await router.route(request_id="late")
    assert int(refused.value.metadata["retry_after_ms"]) >= 100
    for each in waiting:
        each.cancel()
    await queued(router, 0)


async def test_a_request_that_cannot_meet_its_deadline_is_refused_before_it_has_passed(router: Router) -> None:
    """Once it is known how fast the queue moves: here, by far too slowly."""
    waiting = [ask(router, f"{number}", priority=1) for number in range(3)]
    await queued(router, 3)
    async with Redis.from_url(router.url) as redis:
        await redis.hset("forebay:pace:m", mapping={"interval_ms": "20000", "samples": "9"})
    with rpc.deadline(30), pytest.raises(DeadlineExceeded, match="the queue takes about") as refused:
        await router.route(request_id="late")
    assert int(refused.value.metadata["retry_after_ms"]) >= 20_000
    for each in waiting:
        each.cancel()
    await queued(router, 0)


async def test_a_deadline_that_passes_in_the_queue_ends_the_wait_and_leaves_nothing(router: Router) -> None:
    with rpc.deadline(0.3), pytest.raises(DeadlineExceeded):
        await router.route(request_id="a")
    await queued(router, 0)


async def test_who_goes_away_leaves_the_queue(router: Router) -> None:
    first, second = ask(router, "a"), ask(router, "b")
    await queued(router, 2)
    first.cancel()
    await queued(router, 1)
    await has(router, Room())
    assert (await second).placement.decode.worker_id == "d1"


async def test_a_router_that_drains_sends_who_waits_to_another_one_where_the_place_is_kept(router: Router) -> None:
    other = Router(router.url, "r2", limits=Limits(max_queued=3))
    await other.start()
    await other.until(lambda seen: len(seen) == 1)
    moved = ask(router, "moved")
    await queued(router, 1)
    behind = ask(other, "behind")
    await queued(router, 2)
    router.admission.drain()
    with pytest.raises(Draining):
        await moved
    again = ask(other, "moved")
    await has(router, Room())
    assert (await again).placement.decode.worker_id == "d1"
    assert not behind.done()
    behind.cancel()
    await queued(router, 0)
    await other.admission.settled()
    await other.stop()


async def test_a_request_whose_router_was_gone_for_long_loses_its_place(router: Router) -> None:
    ask_gone = {"class": 51, "tenant": "", "cost": 1, "start": 0, "router": "gone", "number": 0, "left": 1}
    async with Redis.from_url(router.url) as redis:
        await redis.zadd(keys.queue("m"), {f"{0:012}theirs": 0})
        await redis.hset("forebay:parked:m", "theirs", json.dumps(ask_gone))
    waiting = ask(router, "ours")
    await queued(router, 1)  # theirs was dropped when somebody looked
    await has(router, Room())
    assert (await waiting).placement.decode.worker_id == "d1"


async def test_explaining_shows_what_workers_have_and_what_is_reserved(router: Router) -> None:
    await has(router, Room(pages=3))
    placed = await router.route()
    room = next(room for room in (await router.explain()).rooms if room.worker_id == placed.placement.decode.worker_id)
    assert (room.used.sequences, room.used.pages, room.promised.sequences) == (0, 3, 1)
    assert room.promised.pages > 0
    assert room.limits.sequences > 0


async def test_explaining_shows_how_many_wait(router: Router) -> None:
    waiting = ask(router, "a")
    await queued(router, 1)
    answer = await router.explain()
    assert answer.num_queued == 1
    assert "1 request waits" in answer.summary
    waiting.cancel()
    await queued(router, 0)
    assert (await router.explain()).num_queued == 0
