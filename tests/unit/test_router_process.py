"""The router as a process: it registers, serves, and leaves in order."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.forebay.v1 import router_pb2, router_pb2_grpc
from shared import rpc
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from shared.forking import Child
from tests import nursery
from tests.unit.fleets import registration
from tests.valkey import ValkeyProcess

TTL_MS = 60_000


class Outside:
    """What others see of a router process."""

    def __init__(self, valkey: ValkeyProcess, log: Path) -> None:
        self.board, self.channels = Blackboard(valkey.url), rpc.Channels()
        self.command = [sys.executable, "-m", "services.router", "--redis-url", valkey.url, "--heartbeat-ms", "50"]
        self.started: list[Child] = []
        self._log = log

    def start(self, *flags: str) -> Child:
        with self._log.open("ab") as output:
            process = nursery.start("sim", [*self.command, *flags], output)
        self.started.append(process)
        return process

    async def until_said(self, words: str) -> None:
        end = time.monotonic() + 20
        while words not in (said := self._log.read_text()):
            assert time.monotonic() < end, said
            await asyncio.sleep(0.02)

    async def registered(self, *, above: int = 0) -> Registration:
        async with asyncio.timeout(30), self.board.changes() as changes:
            while not (found := [r for r in await self.board.processes(Role.ROUTER) if r.epoch > above]):
                await changes.wait(0.1)
        return found[0]

    async def close(self) -> None:
        for process in self.started:
            process.kill()
            await ended(process)
        await self.channels.close()
        await self.board.close()


@pytest.fixture
async def outside(valkey: ValkeyProcess, tmp_path: Path) -> AsyncIterator[Outside]:
    outside = Outside(valkey, tmp_path / "log")
    yield outside
    await outside.close()


async def ended(process: Child) -> int:
    return await asyncio.to_thread(process.wait, 20)


async def end(process: Child) -> int:
    process.send_signal(signal.SIGTERM)
    return await ended(process)


async def test_a_router_registers_serves_and_leaves_in_order(outside: Outside) -> None:
    process = outside.start("--name", "r1")
    there = await outside.registered()
    assert (there.name, there.pid) == ("r1", process.pid)
    channel = outside.channels.to(there.address)
    health: Any = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest(service="forebay.v1.RouterService"), timeout=10)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert await end(process) == 0
    assert await outside.board.processes(Role.ROUTER) == []


async def test_a_restarted_router_has_a_higher_epoch_and_routes_at_once(outside: Outside) -> None:
    await outside.board.register(registration("d1"), TTL_MS)
    first = outside.start("--name", "r1")
    before = await outside.registered()
    first.kill()
    await ended(first)
    outside.start("--name", "r1")
    after = await outside.registered(above=before.epoch)
    stub: Any = router_pb2_grpc.RouterServiceStub(outside.channels.to(after.address))
    request = router_pb2.RouteRequest(request_id="r", model="m", num_prompt_tokens=9)
    placed = await rpc.call(stub.Route, request, 10)
    assert placed.placement.decode.worker_id == "d1"


async def test_a_router_that_was_replaced_ends_itself(outside: Outside) -> None:
    old = outside.start("--name", "r1")
    before = await outside.registered()
    outside.start("--name", "r1")
    await outside.registered(above=before.epoch)
    assert await ended(old) == 0
    assert (await outside.registered(above=before.epoch)).pid != old.pid


async def test_a_router_can_be_ended_before_it_reached_redis(outside: Outside, valkey: ValkeyProcess) -> None:
    valkey.stop()
    process = outside.start()
    await outside.until_said("waiting for the blackboard")
    assert await end(process) == 0


async def test_a_wrong_flag_ends_the_process_with_a_message(outside: Outside) -> None:
    process = outside.start("--max-queued", "-1")
    assert await ended(process) == 2
    await outside.until_said("--max-queued")
