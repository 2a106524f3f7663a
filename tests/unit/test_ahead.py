"""Requests that a router answers before their reservation is written, because there is plenty of room."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import Any

import pytest
from redis.asyncio import Redis

from protos.forebay.v1 import router_pb2
from shared import rpc
from shared.blackboard import keys
from shared.blackboard.admission import Account, Ask, Need, Pair, Parked, Placed
from shared.blackboard.board import TIMEOUT_MS
from shared.blackboard.records import Room
from tests.unit.router_rig import HASHES, TTL_MS, Router
from tests.valkey import ValkeyProcess

EIGHT = Room(sequences=8, tokens=100_000, pages=10_000)
NONE = Room()
D1 = ("d1", 1)


async def says(router: Router, name: str, used: Room = NONE, limits: Room = EIGHT, arrived: Sequence[str] = ()) -> None:
    """A worker says to the blackboard what it has."""
    await router.board.admission.report("m", name, 1, limits=limits, used=used, arrived=arrived, ttl_ms=TTL_MS)


async def account(router: Router, name: str = "d1") -> Account:
    """What is written of a worker, once everything is."""
    await router.admission.settled()
    return (await router.board.admission.accounts([(name, 1)]))[0]


async def promise(router: Router, request_id: str, name: str = "d1") -> bool:
    """Write down what another router sent on its way."""
    return await router.board.admission.promise(request_id, "m", [Need(name, 1, 100, 10)], Pair(0))


def ask(router: Router, name: str, **changes: Any) -> asyncio.Task[router_pb2.RouteResponse]:
    return asyncio.create_task(router.route(request_id=name, page_hashes=b"", **changes))


async def is_parked(router: Router, request_id: str, **changes: Any) -> bool:
    """Whether a request has to wait; it leaves again."""
    waiting = ask(router, request_id, **changes)
    async with asyncio.timeout(10):
        while not waiting.done() and not await router.admission.num_queued("m"):  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    parked = not waiting.done()
    waiting.cancel()
    with suppress(asyncio.CancelledError):
        await waiting
    await router.until_queued(0)
    return parked


@pytest.fixture
async def router(valkey_url: str) -> AsyncIterator[Router]:
    """Of a fleet of one worker, which has reported that nobody is there."""
    router = Router(valkey_url)
    await router.start()
    await router.fleet_of("d1", limits=EIGHT)
    await says(router, "d1")
    yield router
    await router.admission.settled()
    await router.stop()


# The answer -----------------------------------------------------------------------------------------------------------


async def test_the_answer_does_not_wait_for_the_blackboard(valkey: ValkeyProcess) -> None:
    """Which is gone, and the router has yet to notice: it looks once in an hour."""
    router = Router(valkey.url, heartbeat_ms=3_600_000)
    await router.start()
    await router.fleet_of("d1", limits=EIGHT)
    async with Redis.from_url(valkey.url) as redis:
        await redis.client_pause(1_000_000, all=True)
        async with asyncio.timeout(10):
            assert (await router.route()).placement.decode.worker_id == "d1"
            assert router.fleet.is_current
    valkey.stop()
    await router.stop()


async def test_what_is_written_then_is_what_would_have_been_reserved(router: Router) -> None:
    """Of 1,000 tokens in 63 pages the prefill worker has the first 3 pages."""
    await router.fleet_of("d1", "p1", limits=EIGHT)
    await router.cache("p1", HASHES[:3])
    assert (await router.route()).placement.prefill.worker_id == "p1"
    assert (await account(router, "p1")).promised == Room(sequences=1, tokens=952, pages=60)
    assert (await account(router, "d1")).promised == Room(sequences=1, tokens=0, pages=63)


@pytest.mark.parametrize(
    "used",
    [Room(sequences=4), Room(sequences=1, tokens=49_500), Room(sequences=1, pages=4_950)],
    ids=["sequences", "tokens", "pages"],
)
async def test_who_is_half_full_by_his_report_is_asked_for_first(router: Router, used: Room) -> None:
    await router.join("d1", limits=EIGHT, used=used)
    await router.until(lambda _: router.fleet.members("m")[0].registration.used == used)
    await says(router, "d1", used=Room(sequences=8))
    assert await is_parked(router, "a")


async def test_a_worker_that_does_not_say_what_it_takes_is_asked_for_first(router: Router) -> None:
    await router.join("d1")
    await router.until(lambda _: router.fleet.members("m")[0].registration.limits == NONE)
    await says(router, "d1", used=Room(sequences=8))
    assert await is_parked(router, "a")


# Where room becomes tight ---------------------------------------------------------------------------------------------


async def test_a_herd_takes_turns(router: Router) -> None:
    """Nobody is placed beyond what the worker takes, though its report says all the time that it is empty."""
    herd = [ask(router, str(number)) for number in range(30)]
    await router.until_queued(22)
    assert (await account(router)).promised.sequences == 8
    served = set[str]()
    while not all(each.done() for each in herd):
        placed = {str(number) for number, each in enumerate(herd) if each.done()} - served
        served |= placed
        num_left = max(0, 22 - len(served))
        await says(router, "d1", used=NONE, arrived=sorted(placed))  # they came, and are over
        async with asyncio.timeout(10):
            while await router.admission.num_queued("m") > num_left:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.005)
    assert len(await asyncio.gather(*herd)) == 30


async def test_those_who_are_ahead_count_for_those_behind_them(router: Router) -> None:
    """Each takes less than half of the worker, two of them more, three more than all."""
    limits = Room(sequences=100, tokens=2_000, pages=10_000)
    await router.join("d1", limits=limits)
    await router.until(lambda _: router.fleet.members("m")[0].registration.limits == limits)
    await says(router, "d1", limits=limits)
    asked = [ask(router, str(number), num_prompt_tokens=900) for number in range(4)]
    await router.until_queued(2)
    assert (await account(router)).promised == Room(sequences=2, tokens=1_800, pages=2 * 57)
    for each in asked:
        each.cancel()
    await router.until_queued(0)


async def test_who_finds_little_room_left_makes_the_next_ones_ask_first(router: Router) -> None:
    """Another router has filled the worker since its report."""
    await says(router, "d1", used=Room(sequences=8))
    await router.route(request_id="blind")
    assert (await account(router)).promised.sequences == 1
    assert await is_parked(router, "a")


async def test_so_does_who_asked_and_found_little_room(router: Router) -> None:
    """As a prompt does that fills more than half of it."""
    limits = Room(sequences=8, tokens=1_500, pages=10_000)
    await router.join("d1", limits=limits)
    await router.until(lambda _: router.fleet.members("m")[0].registration.limits == limits)
    await says(router, "d1", limits=limits)
    await router.route(request_id="long")
    await says(router, "d1", limits=limits, used=Room(sequences=8))
    assert await is_parked(router, "short", num_prompt_tokens=10)


async def test_nobody_goes_ahead_of_those_who_wait_for_another_router(router: Router) -> None:
    await says(router, "d1", used=Room(sequences=8))
    theirs = Ask("theirs", "m")
    board = router.board.admission
    assert isinstance(await board.reserve(theirs, [Need("d1", 1, 1, 1)], [Pair(0)], router="r2", max_queued=9), Parked)
    await says(router, "d1")
    assert not await promise(router, "a")  # room enough, but somebody waits
    await board.withdraw(theirs, "r2", [])
    assert await promise(router, "b")


async def test_a_request_that_another_router_parked_leaves_the_queue(router: Router) -> None:
    await says(router, "d1", used=Room(sequences=8))
    await router.board.admission.reserve(Ask("a", "m"), [Need("d1", 1, 1, 1)], [Pair(0)], router="r2", max_queued=9)
    await router.until_queued(1)
    await router.route(request_id="a")
    await router.admission.settled()
    await router.until_queued(0)


# The end of a promise -------------------------------------------------------------------------------------------------


async def test_it_ends_when_its_request_has_arrived(router: Router) -> None:
    await router.route(request_id="a")
    await router.admission.settled()
    await says(router, "d1", used=Room(sequences=1), arrived=["a"])
    assert (await account(router)).promised == NONE


async def test_it_is_void_if_its_request_arrived_before_it_was_written(router: Router) -> None:
    await says(router, "d1", used=Room(sequences=1), arrived=["a"])
    await promise(router, "a")
    assert (await account(router)).promised == NONE


async def test_it_is_void_if_it_was_given_back_before_it_was_written(router: Router) -> None:
    await router.board.admission.give_back("a", "m", [D1])
    await promise(router, "a")
    assert (await account(router)).promised == NONE


async def test_a_request_that_comes_again_is_reserved_for_all_the_same(router: Router) -> None:
    await router.board.admission.give_back("a", "m", [D1])
    verdict = await router.board.admission.reserve(
        Ask("a", "m"), [Need("d1", 1, 100, 10)], [Pair(0)], router="r1", max_queued=9
    )
    assert verdict == Placed(0)
    assert (await account(router)).promised == Room(sequences=1, tokens=100, pages=10)


async def test_what_is_kept_of_an_arrival_goes_by_itself(router: Router) -> None:
    await says(router, "d1", arrived=["direct"])
    async with Redis.from_url(router.url) as redis:
        assert await redis.zcard(keys.promises(*D1)) == 1
        await redis.zadd(keys.promises(*D1), {"direct": 1})  # its time (unix ms) is over
        await says(router, "d1")
        assert await redis.zcard(keys.promises(*D1)) == 0
    assert (await account(router)).promised == NONE


async def test_what_is_given_back_at_once_leaves_nothing(router: Router) -> None:
    placement = (await router.route(request_id="a")).placement
    asked = router_pb2.WithdrawRequest(request_id="a", model="m", placement=placement)
    await rpc.call(router.stub.Withdraw, asked, 10)
    assert (await account(router)).promised == NONE
    async with Redis.from_url(router.url) as redis:
        assert not await redis.exists(keys.promises(*D1))


async def test_written_twice_it_counts_once(router: Router) -> None:
    """As after the loss of a connection."""
    await promise(router, "a")
    await promise(router, "a")
    assert (await account(router)).promised == Room(sequences=1, tokens=100, pages=10)


async def test_one_that_cannot_be_written_makes_the_next_ones_ask_first(valkey: ValkeyProcess) -> None:
    """It goes where it was sent all the same. Redis stands still for longer than a router waits for it."""
    router = Router(valkey.url, heartbeat_ms=3_600_000, redis_timeout_ms=TIMEOUT_MS)
    await router.start()
    await router.fleet_of("d1", limits=EIGHT)
    async with Redis.from_url(valkey.url) as redis:
        await redis.client_pause(1_500, all=True)
        assert (await router.route(request_id="a")).placement.decode.worker_id == "d1"
        await router.admission.settled()
        await redis.ping()
    await says(router, "d1", used=Room(sequences=8))
    assert router.fleet.is_current
    assert await is_parked(router, "b")
    await router.admission.settled()
    await router.stop()
