"""What a worker tells the prefix index, on a real server: changes as they come, and nothing while there are none."""

import asyncio
import os
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from shared.blackboard.board import Blackboard
from shared.engine.kv.store import KvStore
from shared.worker.index_writer import IndexWriter

INTERVAL_MS, TTL_MS = 10, 60_000


class World:
    """A worker's store, its writer, and what Redis has of it."""

    def __init__(self, url: str) -> None:
        self.board, self.kv = Blackboard(url), KvStore(64, 16, 10_000)
        self.writer = IndexWriter(self.board, self.kv, "d1", 1, INTERVAL_MS, TTL_MS)

    def compute(self, num_pages: int) -> set[bytes]:
        hashes = [os.urandom(16) for _ in range(num_pages)]
        table = self.kv.reserve((), num_pages)
        assert table is not None
        self.kv.publish(table, 0, hashes)
        return set(hashes)

    async def until_known(self, hashes: set[bytes]) -> None:
        async with asyncio.timeout(10):
            while await self.board.index.hashes("d1", 1) != hashes:  # noqa: ASYNC110 - an index has no event
                await asyncio.sleep(0.005)


@pytest.fixture
async def world(valkey_url: str) -> AsyncIterator[World]:
    world = World(valkey_url)
    yield world
    await world.writer.stop()
    await world.board.close()


async def test_what_was_computed_before_it_began_and_what_is_later_is_written(world: World) -> None:
    first = world.compute(3)
    world.writer.start()
    await world.until_known(first)
    second = world.compute(2)
    await world.until_known(first | second)
    third = await asyncio.to_thread(world.compute, 1)  # as the engine's thread does
    await world.until_known(first | second | third)


async def test_nothing_is_said_while_nothing_changes(world: World, valkey_url: str) -> None:
    world.writer.start()
    await world.until_known(world.compute(1))
    async with Redis.from_url(valkey_url) as redis, redis.monitor() as monitor:
        await asyncio.sleep(20 * INTERVAL_MS / 1000)
        await redis.echo("the end")
        seen = []
        while (command := (await monitor.next_command())["command"]) != "ECHO the end":
            seen.append(command.split()[0])
    assert set(seen) <= {"HELLO", "CLIENT"}


async def test_a_store_tells_of_its_first_change_alone_until_they_are_taken(world: World) -> None:
    told: list[bool] = []
    world.kv.on_events = lambda: told.append(True)
    world.compute(2)
    world.compute(2)
    assert len(told) == 1
    assert len(world.kv.drain_events()) == 4
    world.compute(1)
    assert len(told) == 2
