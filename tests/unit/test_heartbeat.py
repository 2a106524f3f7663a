"""A process stays registered while it lives, through the loss of Redis."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import ClassVar

import pytest

from shared.blackboard.board import Blackboard
from shared.blackboard.heartbeat import Heartbeat, await_epoch
from shared.blackboard.records import Registration, Role
from shared.errors import BlackboardLost
from tests.valkey import ValkeyProcess

TTL_MS = 60_000
REGISTRATION = Registration(role=Role.PREFILL, name="p1", epoch=5, pid=1, address="h:1")


@dataclass
class Process:
    """A process whose registration the test changes."""

    board: Blackboard
    interval_ms: int = 10
    registration: Registration = REGISTRATION
    replaced: asyncio.Event = field(default_factory=asyncio.Event)
    index_lost: asyncio.Event = field(default_factory=asyncio.Event)

    def heartbeat(self) -> Heartbeat:
        async def write_index() -> None:
            await self.board.index.replace("p1", 5, [b"h" * 16], TTL_MS)
            self.index_lost.set()

        return Heartbeat(
            self.board,
            lambda: self.registration,
            interval_ms=self.interval_ms,
            ttl_ms=TTL_MS,
            on_replaced=self.replaced.set,
            on_index_lost=write_index,
        )


@pytest.fixture
async def board(valkey: ValkeyProcess) -> AsyncIterator[Blackboard]:
    board = Blackboard(valkey.url)
    yield board
    await board.close()


async def until(board: Blackboard, true: Callable[[list[Registration]], bool]) -> None:
    async with asyncio.timeout(10), board.changes() as changes:
        while not true(await board.processes(Role.PREFILL)):
            await changes.wait(0.05)


async def test_a_started_process_is_registered_and_a_stopped_one_is_not(board: Blackboard) -> None:
    heartbeat = Process(board).heartbeat()
    heartbeat.start()
    await until(board, lambda found: [p.name for p in found] == ["p1"])
    await heartbeat.stop()
    assert await board.processes(Role.PREFILL) == []


async def test_draining_is_announced_long_before_the_next_heartbeat(board: Blackboard) -> None:
    process = Process(board, interval_ms=3_600_000)
    heartbeat = process.heartbeat()
    heartbeat.start()
    await until(board, bool)
    process.registration = process.registration.model_copy(update={"draining": True})
    heartbeat.announce()
    await until(board, lambda found: found[0].draining)
    await heartbeat.stop()


async def test_registration_and_index_come_back_after_redis_was_restarted(
    board: Blackboard, valkey: ValkeyProcess
) -> None:
    process = Process(board)
    heartbeat = process.heartbeat()
    heartbeat.start()
    await asyncio.wait_for(process.index_lost.wait(), 10)
    valkey.stop()
    process.index_lost.clear()
    valkey.start()
    await asyncio.wait_for(process.index_lost.wait(), 10)
    assert await board.index.hashes("p1", 5) == {b"h" * 16}
    assert [p.name for p in await board.processes(Role.PREFILL)] == ["p1"]
    await heartbeat.stop()


async def test_a_replaced_process_is_told_to_end(board: Blackboard) -> None:
    process = Process(board)
    heartbeat = process.heartbeat()
    heartbeat.start()
    await until(board, bool)
    await board.register(process.registration.model_copy(update={"epoch": 6}), TTL_MS)
    await asyncio.wait_for(process.replaced.wait(), 10)
    await heartbeat.stop()


async def test_an_announcement_that_redis_missed_is_made_again() -> None:
    class Flaky(Blackboard):
        """Fails once; ends the test at the third heartbeat."""

        announced: ClassVar[list[bool]] = []
        third = asyncio.Event()

        async def register(self, registration: Registration, ttl_ms: int, *, announce: bool = False) -> bool:
            self.announced.append(announce)
            if len(self.announced) == 1:
                raise BlackboardLost("gone")
            if len(self.announced) == 3:
                self.third.set()
            return True

    board = Flaky("redis://127.0.0.1:1")
    heartbeat = Process(board).heartbeat()
    heartbeat.start()
    await asyncio.wait_for(board.third.wait(), 10)
    await heartbeat.stop()
    assert board.announced[:3] == [True, True, False]
    await board.close()


async def test_stopping_without_redis_is_no_fault(board: Blackboard, valkey: ValkeyProcess) -> None:
    heartbeat = Process(board).heartbeat()
    heartbeat.start()
    await until(board, bool)
    valkey.stop()
    await heartbeat.stop()


async def test_a_process_that_starts_before_redis_waits_for_it(board: Blackboard, valkey: ValkeyProcess) -> None:
    valkey.stop()
    waiting = asyncio.create_task(await_epoch(board, "p1", 10, asyncio.Event()))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    valkey.start()
    assert await asyncio.wait_for(waiting, 10)


async def test_a_process_told_to_end_before_redis_is_there_waits_no_longer() -> None:
    board, stop = Blackboard("redis://127.0.0.1:1"), asyncio.Event()
    waiting = asyncio.create_task(await_epoch(board, "p1", 3_600_000, stop))
    stop.set()
    assert await asyncio.wait_for(waiting, 10) is None
    await board.close()
