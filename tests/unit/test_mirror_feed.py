"""The mirror on a real server: fed while Redis is there, kept while it is away, read again when it is back."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable

import pytest
import redis.asyncio

from services.router.candidate import Weights
from services.router.fleet import Fleet
from services.router.mirror import Mirror
from services.router.mirror_feed import MirrorFeed
from shared.blackboard import keys
from shared.blackboard.board import Blackboard
from shared.blackboard.index import IndexEvent, PrefixIndex
from tests.unit.fleets import registration
from tests.valkey import ValkeyProcess

TTL_MS = 60_000
HASHES = [os.urandom(16) for _ in range(6_000)]


class World:
    """A mirror that is fed, and a worker `d1`."""

    def __init__(self, url: str, audit_s: float = 3_600.0, index: PrefixIndex | None = None) -> None:
        self.raw = redis.Redis.from_url(url)
        self.board = Blackboard(url)
        self.fleet = Fleet(self.board, Weights(), heartbeat_ms=20, ttl_ms=TTL_MS)
        self.mirror = Mirror(max_pages=100_000)
        self.feed = MirrorFeed(index or self.board.index, self.fleet, self.mirror, audit_s=audit_s)
        self.fleet.observe([registration("d1")])

    def start(self) -> None:
        self.task = asyncio.create_task(self.feed.run())

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait({self.task})
        await self.board.close()
        self.raw.close()

    def run(self, name: str = "d1") -> int:
        return int(self.mirror.runs(b"".join(HASHES), [(name, 1)])[0])

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(15):
            while not true():  # noqa: ASYNC110 - a mirror has no event
                await asyncio.sleep(0.005)


@pytest.fixture
async def world(valkey: ValkeyProcess) -> AsyncIterator[World]:
    world = World(valkey.url)
    yield world
    await world.stop()


async def test_it_is_not_ready_before_every_set_was_read(world: World) -> None:
    await world.board.index.replace("d1", 1, HASHES, TTL_MS)
    world.start()
    assert not world.feed.ready.is_set()
    await asyncio.wait_for(world.feed.ready.wait(), 15)
    assert world.run() == len(HASHES)


async def test_changes_arrive(world: World) -> None:
    await world.board.index.replace("d1", 1, HASHES[:10], TTL_MS)
    world.start()
    await world.feed.ready.wait()
    await world.board.index.update("d1", 1, HASHES[10:20], (), TTL_MS)
    await world.until(lambda: world.run() == 20)
    await world.board.index.update("d1", 1, (), HASHES[15:20], TTL_MS)
    await world.until(lambda: world.run() == 15)


async def test_changes_that_were_trimmed_from_the_stream_are_made_up_for(world: World) -> None:
    await world.board.index.replace("d1", 1, HASHES[:10], TTL_MS)
    world.start()
    await world.feed.ready.wait()
    pipeline = world.raw.pipeline()
    pipeline.sadd(keys.index("d1", 1), *HASHES[10:20])
    pipeline.incr(keys.index_count("d1", 1))
    pipeline.execute()
    await world.board.index.update("d1", 1, HASHES[20:21], (), TTL_MS)
    await world.until(lambda: world.run() == 21)


async def test_a_lost_last_change_is_found_by_the_audit(valkey: ValkeyProcess) -> None:
    world = World(valkey.url, audit_s=0.05)
    await world.board.index.replace("d1", 1, HASHES[:10], TTL_MS)
    world.start()
    await world.feed.ready.wait()
    pipeline = world.raw.pipeline()
    pipeline.sadd(keys.index("d1", 1), *HASHES[10:20])
    pipeline.incr(keys.index_count("d1", 1))
    pipeline.execute()
    await world.until(lambda: world.run() == 20)
    await world.stop()


class Quiet(PrefixIndex):
    """An index in which nothing ever changes."""

    async def events(self, position: bytes, wait_ms: int = 0) -> tuple[list[IndexEvent], bytes]:
        await asyncio.Event().wait()
        return await super().events(position, wait_ms)


async def test_a_worker_that_joins_is_read_at_once_though_nothing_changes(valkey_url: str) -> None:
    async with redis.asyncio.Redis.from_url(valkey_url) as raw:
        world = World(valkey_url, index=Quiet(raw, raw))
        await world.board.index.replace("d1", 1, HASHES[:10], TTL_MS)
        await world.board.index.replace("d2", 1, HASHES[:20], TTL_MS)
        world.start()
        await world.until(lambda: world.run() == 10)
        world.fleet.observe([registration("d1"), registration("d2")])
        await world.until(lambda: world.run("d2") == 20)
        await world.stop()


async def test_the_mirror_is_kept_while_redis_is_away_and_read_again_when_it_is_back(
    world: World, valkey: ValkeyProcess
) -> None:
    await world.board.index.replace("d1", 1, HASHES[:10], TTL_MS)
    world.start()
    await world.until(lambda: world.run() == 10)
    valkey.stop()
    await world.until(lambda: not world.feed.is_current)
    assert world.run() == 10
    valkey.start()
    await world.until(lambda: world.feed.is_current)
    assert world.run() == 10
    await world.board.index.replace("d1", 1, HASHES[:30], TTL_MS)
    await world.until(lambda: world.run() == 30)
