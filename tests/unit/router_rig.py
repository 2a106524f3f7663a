"""A router on a real Redis and behind real gRPC, in the process of its test."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from redis.asyncio import Redis

from protos.forebay.v1 import router_pb2, router_pb2_grpc
from services.router.__main__ import SERVICE
from services.router.admission import Admission, Limits
from services.router.candidate import Weights
from services.router.doubts import Doubts
from services.router.fleet import Fleet
from services.router.mirror import Mirror
from services.router.mirror_feed import MirrorFeed
from services.router.placements import Placements
from services.router.servicer import RouterServicer
from shared import rpc
from shared.blackboard import keys
from shared.blackboard.board import Blackboard
from shared.telemetry import Telemetry
from tests.unit.fleets import registration

TTL_MS = 60_000
REDIS_TIMEOUT_MS = 10_000  # longer than a router's own: a machine that stands still for a second has not lost Redis
HASHES = [bytes([number]) * 16 for number in range(62)]
WEIGHTS = Weights()


class Router:
    """A router in this process, its clients' channel, and the workers that a test registers."""

    def __init__(
        self,
        url: str,
        name: str = "r1",
        *,
        heartbeat_ms: int = 20,
        no_worker_wait_ms: int = 0,
        limits: Limits = Limits(),  # noqa: B008 - frozen
        clock: Callable[[], float] = time.monotonic,
        redis_timeout_ms: int = REDIS_TIMEOUT_MS,
    ) -> None:
        self.url, self.board = url, Blackboard(url, redis_timeout_ms)
        self.telemetry = Telemetry("router", "r1")
        self.fleet = Fleet(self.board, WEIGHTS, heartbeat_ms=heartbeat_ms, ttl_ms=TTL_MS, clock=clock)
        self.server = rpc.Server(self.telemetry, [SERVICE])
        self.mirror = Mirror(max_pages=10_000)
        self.feed = MirrorFeed(self.board.index, self.fleet, self.mirror)
        self.admission = Admission(self.board.admission, name, limits, self.telemetry.meter)
        self.placements = Placements(self.fleet, self.board.placements, name)
        self.doubts = Doubts(self.fleet)
        self.servicer = RouterServicer(
            *(self.fleet, self.mirror, self.placements, self.doubts, self.admission),
            *(WEIGHTS, self.telemetry, no_worker_wait_ms),
        )
        router_pb2_grpc.add_RouterServiceServicer_to_server(self.servicer, self.server.grpc)
        self.channels = rpc.Channels()

    async def start(self) -> int:
        """The port."""
        running = (each.run() for each in (self.fleet, self.feed, self.placements, self.doubts, self.admission))
        self.watching = [asyncio.create_task(each) for each in running]
        port = await self.server.start("127.0.0.1", 0)
        self.channel = self.channels.to(f"127.0.0.1:{port}")
        await self.channel.channel_ready()  # a first call would give it a tenth of a second only
        self.stub: Any = router_pb2_grpc.RouterServiceStub(self.channel)
        return port

    async def stop(self) -> None:
        for task in self.watching:
            task.cancel()
        await asyncio.wait(self.watching)
        await self.channels.close()
        await self.server.stop(0)
        await self.board.close()
        self.telemetry.close()

    async def join(self, name: str, epoch: int = 1, **changes: Any) -> None:
        await self.board.register(registration(name, epoch, **changes), TTL_MS, announce=True)

    async def cache(self, name: str, hashes: list[bytes]) -> None:
        """Make these the pages of a worker, and wait until the router knows."""
        await self.board.index.replace(name, 1, hashes, TTL_MS)
        joined = b"".join(HASHES)
        await self.until(lambda _: self.mirror.runs(joined, [(name, 1)]).tolist() == [len(hashes)])

    async def until(self, true: Callable[[list[tuple[str, int]]], bool]) -> None:
        """Wait for the view to be as the test wants it."""
        async with asyncio.timeout(15):
            while not (self.fleet.is_current and true(self.seen())):  # noqa: ASYNC110 - the view has no event
                await asyncio.sleep(0.005)

    def seen(self) -> list[tuple[str, int]]:
        return [(member.registration.name, member.registration.epoch) for member in self.fleet.members("m")]

    async def fleet_of(self, *names: str, **changes: Any) -> None:
        for name in names:
            await self.join(name, **changes)
        await self.until(lambda seen: len(seen) == len(names))

    async def route(self, **changes: Any) -> router_pb2.RouteResponse:
        answer: router_pb2.RouteResponse = await rpc.call(self.stub.Route, request(**changes), 10)
        return answer

    async def num_promised(self, name: str) -> int:
        """Requests that a worker is promised to have."""
        async with Redis.from_url(self.url) as redis:
            return int(await redis.hget(keys.room(name, 1), "promised_sequences") or 0)

    async def until_queued(self, number: int) -> None:
        """Wait until so many requests are in the queue."""
        async with asyncio.timeout(10):
            while await self.board.admission.num_queued(["m"]) != [number]:  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)

    async def explain(self, **changes: Any) -> router_pb2.ExplainResponse:
        asked = router_pb2.ExplainRequest(request=request(**changes))
        answer: router_pb2.ExplainResponse = await rpc.call(self.stub.Explain, asked, 10)
        return answer


def request(**changes: Any) -> router_pb2.RouteRequest:
    fields: dict[str, Any] = {"request_id": "r", "model": "m", "num_prompt_tokens": 1_000}
    return router_pb2.RouteRequest(**fields | {"page_hashes": b"".join(HASHES)} | changes)
