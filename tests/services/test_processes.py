"""Two worker processes and a Valkey, as they are deployed: pages by NIXL, faults by signals."""

import asyncio
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from protos.forebay.v1 import decode_pb2, decode_pb2_grpc, generation_pb2, kv_pb2
from shared import page_hash, rpc
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from shared.errors import BlackboardLost, WorkerLost
from tests.services.workers import KEY, prompt
from tests.valkey import ValkeyProcess

PATIENCE_S = 30.0
FLAGS = ["--engine", "sim", "--kv-cache-mb", "16", "--max-step-tokens", "128", "--sim-decode-ms", "2"]


class Pair:
    """A prefill and a decode worker, each a process of its own, and what Redis knows of them."""

    def __init__(self, valkey: ValkeyProcess, flags: Sequence[str] = FLAGS, model: str = "sim") -> None:
        self.valkey, self.flags, self.model = valkey, flags, model
        self.board = Blackboard(valkey.url)
        self.channels = rpc.Channels()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.found: dict[str, Registration] = {}

    def launch(self, name: str, *flags: str) -> None:
        command = [sys.executable, "-m", f"services.{name}", "--name", name, "--redis-url", self.valkey.url]
        self.processes[name] = subprocess.Popen([*command, *self.flags, *flags], stderr=subprocess.DEVNULL)

    async def registered(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until both are registered by their present processes."""

        async def both() -> bool:
            listed = await self.board.processes(Role.PREFILL, Role.DECODE)
            self.found = {each.name: each for each in listed if each.pid == self.processes[each.name].pid}
            return len(self.found) == 2

        await comes_true(both, patience_s)

    def request(self, num_tokens: int, max_tokens: int = 8, first: int = 100) -> decode_pb2.GenerateRequest:
        """A prompt for the prefill worker, to be continued on the decode worker."""
        decode, prefill = (
            kv_pb2.WorkerRef(worker_id=each.name, epoch=each.epoch, address=each.address)
            for each in (self.found["decode"], self.found["prefill"])
        )
        sampling = generation_pb2.SamplingParams(max_tokens=max_tokens, top_p=1, repetition_penalty=1, ignore_eos=True)
        return decode_pb2.GenerateRequest(
            request_id="r",
            model=self.model,
            prompt_token_ids=prompt(num_tokens, first),
            sampling=sampling,
            hash_key=KEY,
            placement=decode_pb2.Placement(decode=decode, prefill=prefill),
        )

    async def generate(self, message: decode_pb2.GenerateRequest, started: asyncio.Event | None = None) -> list[int]:
        """The tokens of a request; `started` is set with the first ones."""
        stub: Any = decode_pb2_grpc.DecodeServiceStub(self.channels.to(message.placement.decode.address))
        tokens: list[int] = []
        async with aclosing(rpc.stream(stub.Generate, message, PATIENCE_S)) as responses:
            async for response in responses:
                tokens += response.tokens.token_ids
                if started is not None:
                    started.set()
        return tokens

    async def aggregated(self, message: decode_pb2.GenerateRequest) -> list[int]:
        """The tokens of the same request computed on the decode worker, under another tenant, so without its cache."""
        copy = decode_pb2.GenerateRequest()
        copy.CopyFrom(message)
        copy.hash_key = b"another tenant"
        copy.placement.ClearField("prefill")
        return await self.generate(copy)

    def measure(self, name: str, measure: str) -> float:
        """A number from a worker's metrics; the sum if there are several."""
        with urllib.request.urlopen(f"http://{self.found[name].metrics_address}/metrics", timeout=5) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(measure))

    async def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        await self.channels.close()
        await self.board.close()


async def comes_true(condition: Callable[[], Awaitable[bool]], patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


@pytest.fixture
async def pair() -> AsyncGenerator[Pair, None]:
    valkey = ValkeyProcess()
    valkey.start()
    pair = Pair(valkey)
    try:
        pair.launch("prefill")
        pair.launch("decode")
        await pair.registered()
        yield pair
    finally:
        await pair.close()
        valkey.stop()


async def test_pages_go_from_process_to_process(pair: Pair) -> None:
    message = pair.request(500)
    assert await pair.generate(message) == await pair.aggregated(message)
    page_bytes = 500 // 16 * 16 * pair.found["decode"].card.kv_bytes_per_token  # type: ignore[union-attr]
    assert pair.measure("decode", "forebay_transfer_bytes_total") >= page_bytes
    assert pair.measure("decode", "forebay_prefill_fallbacks_total") == 0
    assert pair.measure("prefill", "forebay_page_faults") == 0
    assert pair.measure("prefill", "forebay_leases_total") == 1
    assert pair.measure("prefill", "forebay_live_leases") == 0


async def test_a_prefill_worker_that_is_stopped_or_killed_costs_no_token(pair: Pair) -> None:
    await pair.generate(pair.request(100, first=9_000))
    stopped = pair.request(500)
    pair.processes["prefill"].send_signal(signal.SIGSTOP)
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


async def test_what_a_killed_worker_handed_over_with_checksums_is_kept(pair: Pair) -> None:
    pair.processes["prefill"].kill()
    pair.processes["prefill"].wait()
    pair.launch("prefill", "--checksums", "--sim-prefill-ms-per-token", "2")
    await pair.registered()
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
    valkey = ValkeyProcess()
    valkey.start()
    pair = Pair(valkey)
    try:
        pair.launch("prefill")
        pair.launch("decode", "--sim-decode-ms", "600000", "--step-timeout-ms", "500")
        await pair.registered()
        with pytest.raises(WorkerLost, match="the engine stands still"):
            await pair.aggregated(pair.request(20))
        assert await asyncio.to_thread(pair.processes["decode"].wait, PATIENCE_S) == 1
    finally:
        await pair.close()
        valkey.stop()
