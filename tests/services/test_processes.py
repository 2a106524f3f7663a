"""Two worker processes and a Valkey, as they are deployed: pages by NIXL, faults by signals."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager

import pytest

from shared import page_hash
from shared.blackboard.records import Role
from shared.errors import BlackboardLost, WorkerLost
from tests import standstill
from tests.services.worker_pair import FLAGS, PATIENCE_S, Pair, comes_true
from tests.services.workers import KEY
from tests.valkey import ValkeyProcess

SLOW = ("--sim-prefill-ms-per-token", "2")  # amid a prompt for as long as a test needs it


@asynccontextmanager
async def started(flags: Mapping[str, Sequence[str]]) -> AsyncGenerator[Pair, None]:
    """The workers that are named, with flags of their own."""
    valkey = ValkeyProcess()
    valkey.start()
    made = Pair(valkey)
    try:
        for name, own in flags.items():
            made.launch(name, *own)
        await made.registered()
        yield made
    finally:
        await made.close()
        valkey.stop()


@pytest.fixture
async def pair(request: pytest.FixtureRequest) -> AsyncGenerator[Pair, None]:
    """A prefill worker with a test's flags, if it has any, and a decode worker."""
    async with started({"prefill": getattr(request, "param", ()), "decode": ()}) as made:
        yield made


async def test_pages_go_from_process_to_process(pair: Pair) -> None:
    message = pair.request(500)
    assert await pair.generate(message) == await pair.aggregated(message)
    page_bytes = 500 // 16 * 16 * pair.found["decode"].card.kv_bytes_per_token  # type: ignore[union-attr]
    assert pair.measure("decode", "forebay_transfer_bytes_total") >= page_bytes
    assert pair.measure("decode", "forebay_prefill_fallbacks_total") == 0
    assert pair.measure("prefill", "forebay_page_faults") == 0
    assert pair.measure("prefill", "forebay_leases_total") == 1
    assert pair.measure("prefill", "forebay_live_leases") == 0


@pytest.mark.parametrize("pair", [SLOW], ids=["slow"], indirect=True)
async def test_a_prefill_worker_that_is_stopped_or_killed_costs_no_token(pair: Pair) -> None:
    await pair.generate(pair.request(100, first=9_000))
    stopped = pair.request(500)
    standstill.stop(pair.processes["prefill"].pid)
    tokens = await pair.generate(stopped)
    pair.processes["prefill"].send_signal(signal.SIGCONT)
    assert tokens == await pair.aggregated(stopped)
    killed = pair.request(4_000, first=5_000)
    running = asyncio.ensure_future(pair.generate(killed))

    async def at_work() -> bool:
        listed = await pair.board.processes(Role.PREFILL)
        return any(each.load.num_running for each in listed)

    await comes_true(at_work)
    pair.processes["prefill"].kill()
    assert await running == await pair.aggregated(killed)
    assert pair.measure("decode", "forebay_prefill_fallbacks_total") == 2


async def test_a_restarted_prefill_worker_takes_its_place_with_a_higher_epoch(pair: Pair) -> None:
    await pair.generate(pair.request(100))
    before = pair.found["prefill"].epoch
    pair.processes["prefill"].kill()
    pair.processes["prefill"].wait()
    pair.launch("prefill")
    await pair.registered()
    assert pair.found["prefill"].epoch > before
    message = pair.request(500, first=700)
    assert await pair.generate(message) == await pair.aggregated(message)
    assert pair.measure("decode", "forebay_prefill_fallbacks_total") == 0


async def test_a_terminated_worker_finishes_what_it_has_and_takes_its_name_off_the_board(pair: Pair) -> None:
    started = asyncio.Event()
    message = pair.request(200, max_tokens=300)
    running = asyncio.ensure_future(pair.generate(message, started))
    await asyncio.wait_for(started.wait(), PATIENCE_S)
    os.kill(pair.processes["decode"].pid, signal.SIGTERM)
    assert len(await running) == 300
    status = await asyncio.to_thread(pair.processes["decode"].wait, PATIENCE_S)
    assert status == 0
    assert await pair.board.processes(Role.DECODE) == []


async def test_workers_and_their_index_come_back_after_redis_lost_everything(pair: Pair) -> None:
    message = pair.request(160)
    await pair.generate(message)
    pair.valkey.stop()
    pair.valkey.start()
    hashes = set(page_hash.chain(KEY, message.prompt_token_ids, 16))

    async def both_are_back() -> bool:
        try:
            listed = await pair.board.processes(Role.PREFILL, Role.DECODE)
            found = [await pair.board.index.hashes(each.name, each.epoch) for each in listed]
        except BlackboardLost:
            return False
        # The decode worker computed on, so it has the last page too.
        return len(found) == 2 and all(len(hashes & (there or set())) >= 9 for there in found)

    await comes_true(both_are_back)


async def test_a_worker_that_waits_for_redis_ends_when_it_is_told_to() -> None:
    command = [sys.executable, "-m", "services.decode", "--redis-url", "redis://127.0.0.1:1", *FLAGS]
    worker = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE)
    try:
        assert worker.stderr is not None
        async with asyncio.timeout(PATIENCE_S):
            while b"waiting for the blackboard" not in (line := await worker.stderr.readline()):
                assert line, "it ended by itself"
        worker.terminate()
        await asyncio.wait_for(worker.communicate(), PATIENCE_S)
        assert worker.returncode == 0
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.communicate()


@pytest.mark.parametrize("pair", [("--checksums", *SLOW)], ids=["slow"], indirect=True)
async def test_what_a_killed_worker_handed_over_with_checksums_is_kept(pair: Pair) -> None:
    message = pair.request(4_000)
    running = asyncio.ensure_future(pair.generate(message))

    async def some_pages_are_verified() -> bool:
        return await asyncio.to_thread(pair.measure, "decode", "forebay_checked_pages_total") > 0

    await comes_true(some_pages_are_verified)
    pair.processes["prefill"].kill()
    assert await running == await pair.aggregated(message)
    assert pair.measure("decode", "forebay_kept_tokens_total") >= 128
    assert pair.measure("decode", 'forebay_prefill_fallbacks_total{reason="WORKER_LOST"}') == 1


async def test_a_worker_whose_step_does_not_end_fails_its_streams_and_leaves() -> None:
    async with started({"decode": ("--sim-decode-ms", "600000", "--step-timeout-ms", "500")}) as alone:
        with pytest.raises(WorkerLost, match="the engine stands still"):
            await alone.aggregated(alone.request(20))
        assert await asyncio.to_thread(alone.processes["decode"].wait, PATIENCE_S) == 1
