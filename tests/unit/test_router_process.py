"""The router as a process: it registers, serves, and leaves in order."""

import asyncio
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.forebay.v1 import router_pb2, router_pb2_grpc
from shared import rpc
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from tests.unit.fleets import registration
from tests.valkey import ValkeyProcess

TTL_MS = 60_000


class Outside:
    """What others see of a router process."""

    def __init__(self, valkey: ValkeyProcess) -> None:
        self.board, self.channels = Blackboard(valkey.url), rpc.Channels()
        self.command = [sys.executable, "-m", "services.router", "--redis-url", valkey.url, "--heartbeat-ms", "50"]
        self.started: list[Process] = []

    async def start(self, *flags: str) -> Process:
        process = await asyncio.create_subprocess_exec(*self.command, *flags, stderr=PIPE)
        self.started.append(process)
        return process

    async def registered(self, *, above: int = 0) -> Registration:
        async with asyncio.timeout(30), self.board.changes() as changes:
            while not (found := [r for r in await self.board.processes(Role.ROUTER) if r.epoch > above]):
                await changes.wait(0.1)
        return found[0]

    async def close(self) -> None:
        for process in self.started:
            if process.returncode is None:
                process.kill()
            await process.communicate()
        await self.channels.close()
        await self.board.close()


@pytest.fixture
async def outside(valkey: ValkeyProcess) -> AsyncIterator[Outside]:
    outside = Outside(valkey)
    yield outside
    await outside.close()


async def end(process: Process) -> int:
    process.send_signal(signal.SIGTERM)
    return await asyncio.wait_for(process.wait(), 20)


async def test_a_router_registers_serves_and_leaves_in_order(outside: Outside) -> None:
    process = await outside.start("--name", "r1")
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
    first = await outside.start("--name", "r1")
    before = await outside.registered()
    first.kill()
    await first.wait()
    await outside.start("--name", "r1")
    after = await outside.registered(above=before.epoch)
    stub: Any = router_pb2_grpc.RouterServiceStub(outside.channels.to(after.address))
    request = router_pb2.RouteRequest(request_id="r", model="m", num_prompt_tokens=9)
    placed = await rpc.call(stub.Route, request, 10)
    assert placed.placement.decode.worker_id == "d1"


async def test_a_router_that_was_replaced_ends_itself(outside: Outside) -> None:
    old = await outside.start("--name", "r1")
    before = await outside.registered()
    await outside.start("--name", "r1")
    await outside.registered(above=before.epoch)
    assert await asyncio.wait_for(old.wait(), 20) == 0
    assert (await outside.registered(above=before.epoch)).pid != old.pid


async def test_a_router_can_be_ended_before_it_reached_redis(outside: Outside, valkey: ValkeyProcess) -> None:
    valkey.stop()
    process = await outside.start()
    assert process.stderr is not None
    while b"waiting for the blackboard" not in await asyncio.wait_for(process.stderr.readline(), 20):
        pass
    assert await end(process) == 0


async def test_a_wrong_flag_ends_the_process_with_a_message(outside: Outside) -> None:
    process = await outside.start("--max-queued", "-1")
    _, said = await asyncio.wait_for(process.communicate(), 20)
    assert process.returncode == 2
    assert b"--max-queued" in said
