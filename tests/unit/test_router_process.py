"""The router as a process: it registers, serves, and leaves in order."""

import asyncio
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.forebay.v1 import router_pb2, router_pb2_grpc
from shared import rpc
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from tests.launcher import Launched, Launcher
from tests.unit.fleets import registration
from tests.valkey import ValkeyProcess

TTL_MS = 60_000


class Outside:
    """What others see of a router process."""

    def __init__(self, valkey: ValkeyProcess, launcher: Launcher) -> None:
        self.board, self.channels = Blackboard(valkey.url), rpc.Channels()
        self.flags = ["--redis-url", valkey.url, "--heartbeat-ms", "50"]
        self.launcher = launcher
        self.started: list[Launched] = []

    async def start(self, *flags: str) -> Launched:
        process = await self.launcher.start("services.router", *self.flags, *flags)
        self.started.append(process)
        return process

    async def registered(self, *, above: int = 0) -> Registration:
        async with asyncio.timeout(30), self.board.changes() as changes:
            while not (found := [r for r in await self.board.processes(Role.ROUTER) if r.epoch > above]):
                await changes.wait(0.1)
        return found[0]

    async def close(self) -> None:
        for process in self.started:
            process.send_signal(signal.SIGKILL)
            await process.said.read()
            await process.wait()
        await self.channels.close()
        await self.board.close()


@pytest.fixture
async def outside(valkey: ValkeyProcess, launcher: Launcher) -> AsyncIterator[Outside]:
    outside = Outside(valkey, launcher)
    yield outside
    await outside.close()


async def end(process: Launched) -> int:
    process.send_signal(signal.SIGTERM)
    return await process.wait(20)


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
    first.send_signal(signal.SIGKILL)
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
    assert await old.wait(20) == 0
    assert (await outside.registered(above=before.epoch)).pid != old.pid


async def test_a_router_can_be_ended_before_it_reached_redis(outside: Outside, valkey: ValkeyProcess) -> None:
    valkey.stop()
    process = await outside.start()
    while b"waiting for the blackboard" not in await asyncio.wait_for(process.said.readline(), 20):
        pass
    assert await end(process) == 0


async def test_a_wrong_flag_ends_the_process_with_a_message(launcher: Launcher) -> None:
    done = await launcher.run("services.router", "--max-queued", "-1")
    assert done.status == 2
    assert "--max-queued" in done.said
