"""Room and queue on a real Redis, by the calls that routers and workers make."""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
from redis.asyncio import Redis

from shared.blackboard import keys
from shared.blackboard.admission import (
    MAX_PRIORITY,
    AdmissionBoard,
    Ask,
    Need,
    NoneFits,
    Pair,
    Parked,
    Placed,
    Refused,
    Verdict,
    Wakes,
)
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Room

TTL_MS = 60_000
ONE = Room(sequences=1, tokens=1_000, pages=1_000)
NONE = Room()
Way = tuple[Need, ...]
"""One way to serve a request: a decode worker, and perhaps a prefill worker."""
D1: Way = (Need("d1", 1, 0, 10),)
P1_D1: Way = (Need("d1", 1, 0, 10), Need("p1", 1, 100, 10))


def offered(*ways: Way) -> tuple[list[Need], list[Pair]]:
    """As routers offer them."""
    needs = list(dict.fromkeys(need for way in ways for need in way))
    return needs, [Pair(*map(needs.index, way)) for way in ways]


class World:
    """Routers and workers as the blackboard sees them."""

    def __init__(self, board: AdmissionBoard, redis: Redis, stack: AsyncExitStack) -> None:
        self.board, self.redis, self._stack = board, redis, stack
        self.wakes: dict[str, Wakes] = {}

    async def listen(self, router: str = "r1") -> None:
        self.wakes[router] = await self._stack.enter_async_context(self.board.wakes(router))

    async def woken(self, router: str = "r1") -> list[str]:
        """Requests that a router was told of since it was last asked. Messages of a connection come in order."""
        await self.redis.publish(keys.WAKE + router, "no more")
        told = []
        while (request_id := await self.wakes[router].wait(10)) != "no more":
            assert request_id is not None
            told.append(request_id)
        return told

    async def report(self, name: str = "d1", limits: Room = ONE, used: Room = NONE, arrived: Sequence[str] = ()) -> int:
        return await self.board.report("m", name, 1, limits=limits, used=used, arrived=arrived, ttl_ms=TTL_MS)

    async def reserve(
        self,
        request_id: str,
        *ways: Way,
        router: str = "r1",
        max_queued: int = 100,
        is_partial: bool = False,
        **about: Any,
    ) -> Verdict:
        ask = Ask(request_id, "m", **about)
        options: dict[str, Any] = {"router": router, "max_queued": max_queued, "is_partial": is_partial}
        return await self.board.reserve(ask, *offered(*(ways or [D1])), **options)

    async def full(self, name: str = "d1") -> None:
        await self.report(name, used=Room(sequences=1))

    async def order(self, *request_ids: str) -> list[str]:
        """In which order parked requests get the one place of d1, which each leaves again."""
        served, waiting = [], set(request_ids)
        while waiting:
            await self.report()
            (first,) = set(await self.woken())
            assert await self.reserve(first) == Placed(0)
            await self.report(used=Room(sequences=1), arrived=[first])
            served.append(first)
            waiting.remove(first)
        return served


@pytest.fixture
async def world(valkey_url: str) -> AsyncIterator[World]:
    board = Blackboard(valkey_url)
    async with AsyncExitStack() as stack, Redis.from_url(valkey_url) as redis:
        world = World(board.admission, redis, stack)
        await world.listen()
        yield world
    await board.close()


# Room -----------------------------------------------------------------------------------------------------------------


async def test_the_first_pair_with_room_on_both_workers_is_reserved(world: World) -> None:
    await world.report("d1")
    await world.report("d2")
    await world.full("p1")
    await world.report("p2")
    assert await world.reserve("a", P1_D1, (Need("d2", 1, 0, 10), Need("p2", 1, 100, 10))) == Placed(1)


async def test_a_pair_is_reserved_in_one_round_trip(world: World) -> None:
    await world.reserve("before")  # which may have to bring the script along
    seen: list[str] = []
    async with world.redis.monitor() as monitor, asyncio.timeout(10):
        assert await world.reserve("a", P1_D1) == Placed(0)
        await world.redis.echo("the end")
        while (command := await monitor.next_command())["command"] != "ECHO the end":
            if command["client_type"] != "lua":
                seen.append(command["command"].split()[0])
    assert [name for name in seen if name not in ("HELLO", "CLIENT")] == ["EVALSHA"]


async def test_a_pair_is_never_reserved_by_half(world: World) -> None:
    await world.report("d1")
    await world.full("p1")
    assert isinstance(await world.reserve("a", P1_D1), Parked)
    assert await world.reserve("b", D1, priority=1) == Placed(0)


@pytest.mark.parametrize(
    ("limits", "used"),
    [
        (Room(sequences=3, tokens=1_000, pages=100), Room(sequences=2)),
        (Room(sequences=9, tokens=250, pages=100), Room(sequences=1, tokens=100)),
        (Room(sequences=9, tokens=1_000, pages=25), Room(sequences=1, pages=10)),
    ],
    ids=["sequences", "tokens", "pages"],
)
async def test_promises_count_like_what_workers_report(world: World, limits: Room, used: Room) -> None:
    await world.report("d1", limits, used)
    alone: Way = (Need("d1", 1, 100, 10),)
    assert await world.reserve("a", alone) == Placed(0)
    assert isinstance(await world.reserve("b", alone), Parked)


async def test_an_idle_worker_takes_what_exceeds_its_limits(world: World) -> None:
    await world.report("d1")
    assert await world.reserve("a", (Need("d1", 1, 9_999, 9_999),)) == Placed(0)


async def test_a_prompt_without_tokens_to_compute_does_not_wait_for_those_who_compute(world: World) -> None:
    await world.report("d1", Room(sequences=9, tokens=100, pages=100), Room(sequences=1, tokens=100))
    assert await world.reserve("a", D1) == Placed(0)


async def test_a_worker_that_has_not_reported_yet_has_room(world: World) -> None:
    assert [await world.reserve(str(number), P1_D1) for number in range(5)] == [Placed(0)] * 5


async def test_a_promise_counts_once_when_its_request_has_arrived(world: World) -> None:
    two = Room(sequences=2, tokens=1_000, pages=1_000)
    await world.report("d1", two)
    await world.reserve("a")
    await world.report("d1", two, Room(sequences=1), arrived=["a"])
    assert await world.reserve("b") == Placed(0)
    assert isinstance(await world.reserve("c"), Parked)


async def test_room_and_promises_of_an_earlier_epoch_do_not_count(world: World) -> None:
    await world.full("d1")
    await world.reserve("a")
    assert await world.reserve("b", (Need("d1", 2, 0, 10),), priority=1) == Placed(0)


async def test_requests_of_one_moment_are_served_in_order_on_one_connection(world: World) -> None:
    await world.report("d1", Room(sequences=3, tokens=1_000, pages=1_000))
    assert await world.reserve("before", (Need("d2", 1, 0, 10),)) == Placed(0)
    before = (await world.redis.info("clients"))["connected_clients"]
    verdicts = await asyncio.gather(*(world.reserve(str(number)) for number in range(5)))
    assert verdicts == [*[Placed(0)] * 3, Parked(1), Parked(2)]
    assert (await world.redis.info("clients"))["connected_clients"] == before


async def test_so_they_are_by_a_server_that_was_started_anew(world: World) -> None:
    await world.reserve("before")
    await world.redis.script_flush()
    assert await asyncio.gather(*(world.reserve(str(number)) for number in range(3))) == [Placed(0)] * 3


async def test_a_long_burst_is_served_whole(world: World) -> None:
    numbers = range(200)
    assert await asyncio.gather(*(world.reserve(str(number)) for number in numbers)) == [Placed(0) for _ in numbers]


async def test_a_request_that_is_cancelled_among_others_leaves_them_their_answers(world: World) -> None:
    cancelled, other = (asyncio.create_task(world.reserve(name)) for name in "ab")
    await asyncio.sleep(0)
    cancelled.cancel()
    assert await other == Placed(0)
    assert await world.reserve("c") == Placed(0)


async def test_a_partial_list_without_room_changes_nothing(world: World) -> None:
    await world.full()
    assert await world.reserve("a", is_partial=True) == NoneFits()
    assert await world.board.num_queued(["m"]) == [0]


async def test_withdrawing_gives_both_halves_back(world: World) -> None:
    await world.report("d1")
    await world.report("p1")
    await world.reserve("a", P1_D1)
    assert isinstance(await world.reserve("b", P1_D1), Parked)
    await world.board.withdraw(Ask("a", "m"), "r1", [("d1", 1), ("p1", 1)])
    assert await world.woken() == ["b"]
    assert await world.reserve("b", P1_D1) == Placed(0)


async def test_a_promise_that_nobody_takes_up_lapses(world: World) -> None:
    await world.report("d1")
    await world.reserve("of a gateway that died")
    assert isinstance(await world.reserve("b"), Parked)
    await world.redis.zadd(keys.promises("d1", 1), {"of a gateway that died": 1})  # its time (unix ms) is over
    assert await world.reserve("b") == Placed(0)


# Order ----------------------------------------------------------------------------------------------------------------


async def test_nobody_overtakes_the_queue(world: World) -> None:
    await world.full()
    assert await world.reserve("a") == Parked(1)
    await world.report()
    assert await world.reserve("b") == Parked(2)
    assert await world.reserve("a") == Placed(0)


async def test_within_a_tenant_who_comes_first_is_served_first(world: World) -> None:
    await world.full()
    names = [f"{number}" for number in range(12)]
    for name in names:
        await world.reserve(name, cost=random.Random(name).randint(1, 5_000))
    assert await world.order(*names) == names


async def test_a_tenant_with_few_requests_does_not_wait_for_one_with_many(world: World) -> None:
    await world.full()
    for number in range(10):
        await world.reserve(f"many{number}", tenant="a", cost=100)
    await world.reserve("few", tenant="b", cost=100)
    assert (await world.order("few", *(f"many{number}" for number in range(10)))).index("few") <= 1


async def test_tenants_get_equal_shares_of_tokens_not_of_requests(world: World) -> None:
    await world.full()
    for number in range(6):
        await world.reserve(f"long{number}", tenant="a", cost=400)
    for number in range(24):
        await world.reserve(f"short{number}", tenant="b", cost=100)
    order = await world.order(*(f"long{n}" for n in range(6)), *(f"short{n}" for n in range(24)))
    for end in range(4, len(order)):
        cost = {"l": 400 * sum(n[0] == "l" for n in order[:end]), "s": 100 * sum(n[0] == "s" for n in order[:end])}
        assert abs(cost["l"] - cost["s"]) <= 800, order[:end]


async def test_a_tenant_that_was_away_has_saved_nothing_up(world: World) -> None:
    await world.full()
    for number in range(8):
        await world.reserve(f"a{number}", tenant="a", cost=100)
    for number in range(4):
        await world.report()
        await world.woken()
        assert await world.reserve(f"a{number}") == Placed(0)
        await world.report(used=Room(sequences=1), arrived=[f"a{number}"])
    for number in range(4):
        await world.reserve(f"b{number}", tenant="b", cost=100)
    await world.woken()
    order = await world.order(*(f"a{n}" for n in range(4, 8)), *(f"b{n}" for n in range(4)))
    assert {name[0] for name in order[:2]} == {name[0] for name in order[2:4]} == {"a", "b"}


async def test_a_cancelled_request_costs_its_tenant_nothing(world: World) -> None:
    await world.full()
    await world.reserve("dear", tenant="a", cost=9_000)
    await world.board.withdraw(Ask("dear", "m"), "r1", [])
    await world.reserve("first", tenant="b", cost=100)
    await world.reserve("second", tenant="a", cost=100)
    await world.reserve("third", tenant="b", cost=100)
    await world.woken()
    assert await world.order("first", "second", "third") == ["first", "second", "third"]


async def test_a_higher_class_goes_first_whoever_asks(world: World) -> None:
    await world.full()
    for number, priority in enumerate((0, -MAX_PRIORITY, 5, MAX_PRIORITY, 0, 5)):
        await world.reserve(f"{number}", tenant=f"{number % 2}", priority=priority, cost=1_000_000)
    assert await world.order(*"012345") == ["3", "2", "5", "0", "4", "1"]


async def test_a_resumed_request_goes_before_all_classes(world: World) -> None:
    await world.full()
    await world.reserve("high", priority=MAX_PRIORITY)
    await world.reserve("resumed", resumed=True, priority=-5)
    assert await world.order("high", "resumed") == ["resumed", "high"]


async def test_models_have_queues_of_their_own(world: World) -> None:
    await world.full()
    await world.reserve("a")
    other = offered((Need("x1", 1, 0, 1),))
    assert await world.board.reserve(Ask("b", "other"), *other, router="r1", max_queued=9) == Placed(0)


# Refusals -------------------------------------------------------------------------------------------------------------


async def test_a_full_queue_refuses_with_a_delay(world: World) -> None:
    await world.full()
    for number in range(3):
        await world.reserve(f"{number}", max_queued=3)
    refused = await world.reserve("4", max_queued=3)
    assert isinstance(refused, Refused)
    assert refused.reason == "OVERLOADED"
    assert refused.retry_ms >= 100


async def test_in_a_full_queue_the_last_makes_way_for_one_with_a_better_claim(world: World) -> None:
    await world.full()
    for number in range(3):
        await world.reserve(f"{number}", tenant="a", cost=100, max_queued=3)
    assert await world.reserve("small", tenant="b", cost=100, max_queued=3) == Parked(2)
    assert await world.woken() == ["2"]
    assert isinstance(await world.reserve("2", tenant="a", cost=100, max_queued=3), Refused)
    assert await world.order("0", "small", "1") == ["0", "small", "1"]


async def test_a_deadline_that_the_queue_cannot_meet_is_refused_at_once(world: World) -> None:
    await world.full()
    for number in range(10):
        await world.reserve(f"{number}")
    for number in range(5):
        await asyncio.sleep(0.02)
        await world.report()
        assert await world.reserve(f"{number}") == Placed(0)
        await world.report(used=Room(sequences=1), arrived=[f"{number}"])
    refused = await world.reserve("late", remaining_ms=20)
    assert isinstance(refused, Refused)
    assert (refused.reason, refused.retry_ms >= 100) == ("DEADLINE", True)
    assert isinstance(await world.reserve("patient", remaining_ms=600_000), Parked)


# Waking ---------------------------------------------------------------------------------------------------------------


async def test_room_that_comes_free_wakes_the_first_and_only_it(world: World) -> None:
    await world.full()
    for name in "abc":
        await world.reserve(name)
    await world.report()
    assert await world.woken() == ["a"]


async def test_a_report_without_more_room_wakes_nobody(world: World) -> None:
    await world.full()
    await world.reserve("a")
    await world.full()
    assert await world.woken() == []


async def test_who_was_served_wakes_the_next(world: World) -> None:
    await world.full()
    await world.reserve("a")
    await world.reserve("b")
    await world.report(limits=Room(sequences=2, tokens=1_000, pages=1_000))
    assert await world.woken() == ["a"]
    assert await world.reserve("a") == Placed(0)
    assert await world.woken() == ["b"]


async def test_who_leaves_the_queue_passes_its_turn_on(world: World) -> None:
    await world.full()
    await world.reserve("a")
    await world.reserve("b")
    await world.report()
    assert await world.woken() == ["a"]
    await world.board.withdraw(Ask("a", "m"), "r1", [])
    assert await world.woken() == ["b"]


async def test_a_router_that_is_gone_is_passed_over(world: World) -> None:
    await world.full()
    async with AsyncExitStack() as stack:
        gone = World(world.board, world.redis, stack)
        await gone.listen("r2")
        await world.reserve("theirs", router="r2")
        await world.reserve("ours")
        await world.report()
        assert (await gone.woken("r2"), await world.woken()) == (["theirs"], [])
    async with asyncio.timeout(10):
        while (await world.redis.pubsub_numsub(keys.WAKE + "r2"))[0][1]:  # noqa: ASYNC110 - it has yet to see that
            await asyncio.sleep(0)
    await world.board.tend("m", "r1")
    assert await world.woken() == ["ours"]
    assert await world.reserve("ours") == Placed(0)


async def test_a_request_keeps_its_place_when_another_router_takes_it_over(world: World) -> None:
    await world.full()
    await world.reserve("a", router="r2")
    await world.reserve("b")
    assert await world.reserve("a", router="r1") == Parked(1)
    await world.board.withdraw(Ask("a", "m"), "r2", [])  # the first router clears up late
    await world.woken()
    assert await world.order("a", "b") == ["a", "b"]
