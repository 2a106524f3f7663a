"""The blackboard on a real server: registrations, epochs, announcements, the prefix index, and the loss of Redis."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
import redis
import uvloop

from shared.blackboard import keys
from shared.blackboard.board import Blackboard
from shared.blackboard.connection import faults
from shared.blackboard.index import HASHES_PER_CHANGE, HASHES_PER_PART, MAX_EVENTS, IndexEvent
from shared.blackboard.records import Load, ModelCard, Registration, Role
from shared.errors import BlackboardLost, StaleEpoch
from tests.valkey import ValkeyProcess

TTL_MS = 60_000
CARD = ModelCard(
    model="m", max_model_len=2048, page_size=16, vocab_size=100, eos_token_ids=(2,), compatibility_hash="c"
)


def worker(name: str = "d1", epoch: int = 1, role: Role = Role.DECODE) -> Registration:
    return Registration(role=role, name=name, epoch=epoch, pid=7, address="127.0.0.1:5", card=CARD)


def some_hashes(count: int) -> list[bytes]:
    return [os.urandom(16) for _ in range(count)]


@pytest.fixture
async def board(valkey_url: str) -> AsyncIterator[Blackboard]:
    board = Blackboard(valkey_url)
    yield board
    await board.close()


@pytest.fixture
def raw(valkey_url: str) -> "redis.Redis":
    return redis.Redis.from_url(valkey_url)


async def test_a_registration_is_read_as_it_was_written(board: Blackboard) -> None:
    written = worker().model_copy(update={"load": Load(num_queued_tokens=9, decode_step_ms=1.5)})
    await board.register(written, TTL_MS)
    assert await board.processes(Role.DECODE) == [written]


async def test_processes_are_listed_by_role_and_name(board: Blackboard) -> None:
    for name, role in (("d2", Role.DECODE), ("p1", Role.PREFILL), ("d1", Role.DECODE), ("g1", Role.GATEWAY)):
        await board.register(worker(name, role=role), TTL_MS)
    found = await board.processes(Role.PREFILL, Role.DECODE, Role.ROUTER)
    assert [process.name for process in found] == ["p1", "d1", "d2"]


async def test_a_process_that_stops_registering_is_gone_with_its_index(board: Blackboard, raw: "redis.Redis") -> None:
    await board.index.replace("d1", 1, some_hashes(3), TTL_MS)
    await board.register(worker(), ttl_ms=30)
    await asyncio.sleep(0.05)
    assert await board.processes(Role.DECODE) == []
    assert not raw.exists(keys.index("d1", 1))


async def test_a_heartbeat_renews_registration_and_index(board: Blackboard, raw: "redis.Redis") -> None:
    await board.index.replace("d1", 1, some_hashes(3), ttl_ms=20_000)
    await board.register(worker(), ttl_ms=20_000)
    await board.register(worker(), TTL_MS)
    for key in (keys.process(Role.DECODE, "d1"), keys.index("d1", 1), keys.index_count("d1", 1)):
        assert raw.pttl(key) > 30_000


async def test_deregistering_removes_a_process_and_its_index(board: Blackboard, raw: "redis.Redis") -> None:
    await board.register(worker(), TTL_MS)
    await board.index.replace("d1", 1, some_hashes(3), TTL_MS)
    await board.deregister(worker())
    assert await board.processes(Role.DECODE) == []
    assert not raw.exists(keys.index("d1", 1), keys.index_count("d1", 1), keys.members(Role.DECODE))


async def test_an_incarnation_that_leaves_late_does_not_take_the_new_one_along(board: Blackboard) -> None:
    await board.register(worker(epoch=2), TTL_MS)
    await board.deregister(worker(epoch=1))
    assert await board.processes(Role.DECODE) == [worker(epoch=2)]


async def test_every_key_but_epochs_and_members_expires(board: Blackboard, raw: "redis.Redis") -> None:
    await board.next_epoch("d1")
    await board.register(worker(), TTL_MS, announce=True)
    await board.index.replace("d1", 1, [], TTL_MS)
    await board.index.update("d1", 1, some_hashes(1), (), TTL_MS)
    lasting = {key for key in raw.scan_iter() if raw.pttl(key) < 0}
    assert lasting == {keys.epoch("d1").encode(), keys.members(Role.DECODE).encode()}


async def test_epochs_rise_even_when_redis_forgets_them(board: Blackboard, raw: "redis.Redis") -> None:
    epochs = []
    for _ in range(3):
        epochs += [await board.next_epoch("d1"), await board.next_epoch("d1")]
        raw.flushall()
        await asyncio.sleep(0.005)
    assert epochs == sorted(set(epochs))


async def test_epochs_rise_even_when_the_clock_is_set_back(board: Blackboard, raw: "redis.Redis") -> None:
    raw.set(keys.epoch("d1"), 1 << 60)
    assert await board.next_epoch("d1") == (1 << 60) + 1


async def test_an_incarnation_that_was_replaced_is_told_so(board: Blackboard) -> None:
    await board.register(worker(epoch=2), TTL_MS)
    with pytest.raises(StaleEpoch):
        await board.register(worker(epoch=1), TTL_MS)


async def test_a_malformed_registration_hides_no_other(board: Blackboard, raw: "redis.Redis") -> None:
    for name in ("d1", "d2"):
        await board.register(worker(name), TTL_MS)
    raw.set(keys.process(Role.DECODE, "d1"), b'{"role": 3')
    assert [process.name for process in await board.processes(Role.DECODE)] == ["d2"]


async def test_fields_of_a_newer_version_are_ignored(board: Blackboard, raw: "redis.Redis") -> None:
    await board.register(worker(), TTL_MS)
    newer = worker().model_dump_json()[:-1] + ', "colour": "red"}'
    raw.set(keys.process(Role.DECODE, "d1"), newer)
    assert await board.processes(Role.DECODE) == [worker()]


async def test_names_that_left_long_ago_are_forgotten(board: Blackboard, raw: "redis.Redis") -> None:
    raw.zadd(keys.members(Role.DECODE), {"d0": 1_000})
    await board.register(worker(), TTL_MS)
    assert raw.zrange(keys.members(Role.DECODE), 0, -1) == [b"d1"]


async def test_announcements_wake_listeners(board: Blackboard) -> None:
    async with board.changes() as changes:
        waiting = asyncio.create_task(changes.wait(10))
        await board.register(worker(), TTL_MS, announce=True)
        assert await waiting
        await board.deregister(worker())
        assert await changes.wait(10)


async def test_heartbeats_wake_nobody(board: Blackboard) -> None:
    async with board.changes() as changes:
        await board.register(worker(), TTL_MS)
        assert not await changes.wait(0.05)


async def test_an_earlier_epoch_has_another_index(board: Blackboard) -> None:
    hashes = some_hashes(2)
    await board.index.replace("d1", 1, hashes, TTL_MS)
    assert await board.index.hashes("d1", 1) == set(hashes)
    assert await board.index.hashes("d1", 2) is None


async def test_a_snapshot_that_was_left_half_written_is_not_mixed_into_the_next(
    board: Blackboard, raw: "redis.Redis"
) -> None:
    raw.sadd(keys.index_snapshot("d1", 1), b"x" * 16)
    await board.index.replace("d1", 1, [], TTL_MS)
    assert raw.smembers(keys.index("d1", 1)) == {b""}


async def test_updates_change_an_index(board: Blackboard) -> None:
    hashes = some_hashes(4)
    await board.index.replace("d1", 1, hashes[:2], TTL_MS)
    assert await board.index.update("d1", 1, hashes[2:], hashes[1:2], TTL_MS)
    assert await board.index.hashes("d1", 1) == {hashes[0], *hashes[2:]}


async def test_large_updates_and_snapshots_arrive_whole(board: Blackboard, raw: "redis.Redis") -> None:
    hashes = some_hashes(20 * HASHES_PER_CHANGE + 3)
    await board.index.replace("d1", 1, hashes, TTL_MS)
    assert raw.scard(keys.index("d1", 1)) == len(hashes) + 1
    await board.index.update("d1", 1, (), hashes, TTL_MS)
    assert raw.smembers(keys.index("d1", 1)) == {keys.COMPLETE.encode()}


async def test_every_change_is_on_the_stream_with_a_number_behind_the_last(board: Blackboard) -> None:
    hashes, start = some_hashes(4), await board.index.position()
    await board.index.replace("d1", 1, hashes[:2], TTL_MS)
    await board.index.update("d1", 1, hashes[2:], hashes[:1], TTL_MS)
    await board.index.update("d1", 1, (), hashes[1:2], TTL_MS)
    events, position = await board.index.events(start)
    assert events == [
        IndexEvent("d1", 1, 1, replaced=True),
        IndexEvent("d1", 1, 2, stored=b"".join(hashes[2:]), removed=hashes[0]),
        IndexEvent("d1", 1, 3, removed=hashes[1]),
    ]
    assert await board.index.numbers([("d1", 1), ("d2", 1)]) == [3, 0]
    assert await board.index.events(position) == ([], position)
    assert position == await board.index.position()


async def test_whoever_waits_for_changes_gets_the_first_one(board: Blackboard) -> None:
    waiting = asyncio.create_task(board.index.events(b"0-0", wait_ms=900))
    await board.index.update("d1", 1, some_hashes(1), (), TTL_MS)
    events, _ = await waiting
    assert [event.number for event in events] == [1]


async def test_the_stream_is_bounded(board: Blackboard, raw: "redis.Redis") -> None:
    pipeline = raw.pipeline()
    for _ in range(2 * MAX_EVENTS):
        pipeline.xadd(keys.EVENTS, {"w": "d1"})
    pipeline.execute()
    await board.index.update("d1", 1, some_hashes(1), (), TTL_MS)
    assert raw.xlen(keys.EVENTS) < 1.1 * MAX_EVENTS


async def test_a_malformed_change_hides_no_other(board: Blackboard, raw: "redis.Redis") -> None:
    raw.xadd(keys.EVENTS, {"w": "d1", "e": "one"})
    raw.xadd(keys.EVENTS, {"colour": "red"})
    await board.index.update("d1", 1, some_hashes(1), (), TTL_MS)
    events, _ = await board.index.events(b"0-0")
    assert [event.number for event in events] == [1]


async def test_an_index_is_read_in_parts(board: Blackboard) -> None:
    hashes, found, cursors = some_hashes(5 * HASHES_PER_PART), b"", [0]
    await board.index.replace("d1", 1, hashes, TTL_MS)
    while cursors == [0] or cursors[-1]:
        part = await board.index.part("d1", 1, cursors[-1])
        assert (part.complete, part.number) == (True, 1)
        found += part.hashes
        cursors.append(part.cursor)
    assert len(cursors) > 3
    assert {found[first : first + 16] for first in range(0, len(found), 16)} == set(hashes)


async def test_an_index_that_is_not_there_is_read_as_incomplete(board: Blackboard) -> None:
    part = await board.index.part("d1", 1, 0)
    assert (part.complete, part.number, part.cursor, part.hashes) == (False, 0, 0, b"")


async def test_a_worker_learns_that_redis_lost_its_index(board: Blackboard, raw: "redis.Redis") -> None:
    assert not await board.register(worker(), TTL_MS)
    await board.index.replace("d1", 1, some_hashes(2), TTL_MS)
    assert await board.register(worker(), TTL_MS)
    raw.flushall()
    assert not await board.index.update("d1", 1, some_hashes(1), (), TTL_MS)
    assert not await board.register(worker(), TTL_MS)


async def test_without_redis_everything_is_a_fault_and_it_comes_back_by_itself(valkey: ValkeyProcess) -> None:
    board = Blackboard(valkey.url)
    await board.register(worker(), TTL_MS)
    valkey.stop()
    hashes = some_hashes(1)
    for attempt in (
        board.next_epoch("d1"),
        board.register(worker(), TTL_MS),
        board.deregister(worker()),
        board.processes(Role.DECODE),
        board.index.update("d1", 1, hashes, (), TTL_MS),
        board.index.replace("d1", 1, hashes, TTL_MS),
        board.index.hashes("d1", 1),
        board.index.numbers([("d1", 1)]),
        board.index.part("d1", 1, 0),
        board.index.position(),
        board.index.events(b"0-0", wait_ms=10),
        board.changes().__aenter__(),
    ):
        with pytest.raises(BlackboardLost):
            await attempt
    valkey.start()
    await board.index.replace("d1", 1, hashes, TTL_MS)
    assert await board.index.hashes("d1", 1) == set(hashes)
    await board.close()


async def test_a_restart_of_redis_between_two_commands_goes_unnoticed(valkey: ValkeyProcess) -> None:
    board = Blackboard(valkey.url)
    await board.register(worker(), TTL_MS)
    valkey.stop()
    valkey.start()
    assert await board.processes(Role.DECODE) == []
    await board.close()


async def test_a_listener_learns_that_redis_went_away(valkey: ValkeyProcess) -> None:
    board = Blackboard(valkey.url)
    async with board.changes() as changes:
        valkey.stop()
        with pytest.raises(BlackboardLost):
            await changes.wait(10)
    await board.close()


async def test_a_server_that_accepts_and_never_answers_is_a_fault() -> None:
    left = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()
        await writer.wait_closed()
        left.set()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        board = Blackboard(f"redis://127.0.0.1:{port}", timeout_ms=50)
        with pytest.raises(BlackboardLost):
            await board.processes(Role.DECODE)
        await board.close()
        await asyncio.wait_for(left.wait(), 10)


def test_what_uvloop_says_of_a_connection_that_was_closed_is_a_fault() -> None:
    async def hang_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        await writer.wait_closed()

    async def write() -> None:
        async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as server:
            reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
            await reader.read()
            writer.close()
            await writer.wait_closed()
            with pytest.raises(BlackboardLost, match="the handler is closed"), faults():
                writer.writelines([b"PING"])

    uvloop.run(write())


async def test_a_cancellation_that_the_client_library_swallows_gets_through() -> None:
    async def swallowing() -> None:
        with faults():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise redis.ConnectionError("torn down") from None

    async def swallowing_quietly() -> None:
        with faults(), suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    for action in (swallowing, swallowing_quietly):
        task = asyncio.create_task(action())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_a_task_that_is_being_cancelled_can_still_clean_up(board: Blackboard) -> None:
    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await board.register(worker(), TTL_MS)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await board.processes(Role.DECODE) == [worker()]
