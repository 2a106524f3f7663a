"""Runs of a script on a connection of their own, on a real Redis."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from redis.exceptions import RedisError, ResponseError

from shared.blackboard.connection import connect
from shared.blackboard.together import Together
from tests.valkey import ValkeyProcess

# Answers its argument, and how many runs there were before.
SCRIPT = """
if ARGV[1] == 'wrong' then return redis.error_reply('WRONG') end
return { ARGV[1], redis.call('INCR', KEYS[1]) - 1 }
"""
TIMEOUT_S = 0.5


@asynccontextmanager
async def together(url: str) -> AsyncIterator[Together]:
    redis = connect(url, 1_000)
    runs = Together(redis, SCRIPT, TIMEOUT_S)
    try:
        yield runs
    finally:
        await runs.close()
        await redis.aclose()


async def test_each_run_gets_its_own_answer_in_order(valkey_url: str) -> None:
    async with together(valkey_url) as runs:
        for turn in range(2):
            found = await asyncio.gather(*(runs.run(["n"], [f"{turn} {number}"]) for number in range(50)))
            assert found == [[f"{turn} {number}".encode(), 50 * turn + number] for number in range(50)]


async def test_who_asks_when_it_is_closed_opens_nothing(valkey_url: str) -> None:
    async with together(valkey_url) as runs:
        await runs.run(["n"], ["a"])
    before = asyncio.all_tasks()
    with pytest.raises(RedisError, match="closed"):
        await runs.run(["n"], ["b"])
    assert asyncio.all_tasks() <= before


async def test_an_error_is_the_fault_of_its_run_alone(valkey_url: str) -> None:
    async with together(valkey_url) as runs:
        asked = [runs.run(["n"], [word]) for word in ("a", "wrong", "b")]
        first, wrong, last = await asyncio.gather(*asked, return_exceptions=True)
    assert (first, last) == ([b"a", 0], [b"b", 1])
    assert isinstance(wrong, ResponseError)


async def test_a_server_that_was_started_again_is_asked_again(valkey: ValkeyProcess) -> None:
    async with together(valkey.url) as runs:
        assert await runs.run(["n"], ["a"]) == [b"a", 0]
        valkey.stop()
        valkey.start()
        assert await asyncio.gather(*(runs.run(["n"], [word]) for word in "bc")) == [[b"b", 0], [b"c", 1]]


async def test_without_a_server_runs_fail_until_it_is_back(valkey: ValkeyProcess) -> None:
    async with together(valkey.url) as runs:
        valkey.stop()
        with pytest.raises(RedisError):
            await runs.run(["n"], ["a"])
        valkey.start()
        assert await runs.run(["n"], ["a"]) == [b"a", 0]


async def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_told_and_done_without_afterwards() -> None:
    """The first connection hears nothing any more, as after a change of the network; the second one works."""
    connections: list[asyncio.Task[None] | None] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_deaf = not connections
        connections.append(asyncio.current_task())
        while line := await reader.readline():
            if line.strip() in (b"SETINFO", b"LOAD"):
                writer.write(b"+OK\r\n")
            elif line.strip() == b"EVALSHA" and not is_deaf:
                writer.write(b":7\r\n")
        writer.close()
        await writer.wait_closed()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with together(f"redis://127.0.0.1:{port}") as runs:
            with pytest.raises(TimeoutError):
                await runs.run(["n"], ["a"])
            assert await runs.run(["n"], ["a"]) == 7
        await asyncio.gather(*filter(None, connections))
    assert len(connections) == 2


async def test_who_leaves_takes_nobodys_answer(valkey_url: str) -> None:
    async with together(valkey_url) as runs:
        await runs.run(["n"], ["a"])
        leaving, staying = (asyncio.create_task(runs.run(["n"], [word])) for word in "bc")
        for _ in range(2):
            await asyncio.sleep(0)
        leaving.cancel()
        assert (await staying)[0] == b"c"
        assert (await runs.run(["n"], ["d"]))[0] == b"d"
