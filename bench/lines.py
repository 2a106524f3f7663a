"""What a line between two processes saves beside a gRPC stream for each call, in turns in one run.

    python -m bench.lines [--rounds 15]

A server in a process of its own gives each stream one token per step of a millisecond, as an engine does, 32 in all.
Printed are the CPU time that a request costs client and server with so many at once, and how long a unary call and a
stream's first message take when 20 ms lie between calls. Rounds are short and alternate, so that other work on the
machine meets both ways alike.
"""

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import uvloop

from bench import provenance
from protos.forebay.v1 import decode_pb2, decode_pb2_grpc, generation_pb2, router_pb2, router_pb2_grpc
from shared import rpc
from shared.telemetry import Telemetry

NUM_TOKENS = 32
STEP_S = 0.001
PAUSE_S = 0.02
WIDTHS = (1, 16, 64, 256)
PROMPT = list(range(1000, 1512))


class Decode(decode_pb2_grpc.DecodeServiceServicer):
    """Gives every stream a token per step."""

    def __init__(self) -> None:
        self._stepped = asyncio.Event()

    async def run(self) -> None:
        """Step for ever."""
        while True:
            await asyncio.sleep(STEP_S)
            self._stepped.set()
            self._stepped = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.GenerateResponse]:  # noqa: ARG002
        """See the protocol."""
        for token_id in range(NUM_TOKENS):
            await self._stepped.wait()
            yield decode_pb2.GenerateResponse(tokens=generation_pb2.TokenChunk(token_ids=[20_000 + token_id]))


class Router:
    """Answers at once."""

    async def Route(self, request: router_pb2.RouteRequest, context: Any) -> router_pb2.RouteResponse:  # noqa: ARG002
        """See the protocol."""
        return router_pb2.RouteResponse(num_cached_tokens=request.num_prompt_tokens)

    Explain = Withdraw = Route


def serve(parent: Connection) -> None:
    """The server's process: sends its port, then its CPU time whenever something comes."""

    async def main() -> None:
        server, decode, router = rpc.Server(Telemetry("bench", "lines"), []), Decode(), Router()
        untyped: Any = router
        router_pb2_grpc.add_RouterServiceServicer_to_server(untyped, server.grpc)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, server.grpc)
        stepping = asyncio.create_task(decode.run())
        parent.send(await server.start("127.0.0.1", 0))
        with suppress(EOFError):
            while await asyncio.to_thread(parent.recv):
                parent.send(time.process_time())
        stepping.cancel()
        await server.stop(0)

    uvloop.run(main())


class Client:
    """Calls the server, over a line or not."""

    def __init__(self, child: Connection, port: int) -> None:
        self._child, self._address, self._channels = child, f"127.0.0.1:{port}", rpc.Channels()

    def _stub(self, kind: Any, *, line: bool) -> Any:
        return self._channels.stub(kind, self._address) if line else kind(self._channels.to(self._address))

    async def generate(self, *, line: bool) -> float:
        """Seconds to the first token of a stream that is read to its end."""
        method = self._stub(decode_pb2_grpc.DecodeServiceStub, line=line).Generate
        started, first_s = time.perf_counter(), 0.0
        async with aclosing(rpc.stream(method, decode_pb2.GenerateRequest(prompt_token_ids=PROMPT), 60)) as responses:
            async for _ in responses:
                first_s = first_s or time.perf_counter() - started
        return first_s

    async def route(self, *, line: bool) -> float:
        """Seconds of one unary call."""
        method = self._stub(router_pb2_grpc.RouterServiceStub, line=line).Route
        started = time.perf_counter()
        await rpc.call(method, router_pb2.RouteRequest(num_prompt_tokens=512, page_hashes=bytes(512)), 60)
        return time.perf_counter() - started

    def cpu_s(self) -> tuple[float, float]:
        """CPU seconds so far: the client's and the server's."""
        self._child.send(True)
        return time.process_time(), float(self._child.recv())

    async def cost_ms(self, width: int, *, line: bool) -> tuple[float, float]:
        """CPU of client and server for a request, `width` of them at once."""
        before = self.cpu_s()
        await asyncio.gather(*(self.generate(line=line) for _ in range(width)))
        own, theirs = self.cpu_s()
        return (own - before[0]) * 1e3 / width, (theirs - before[1]) * 1e3 / width

    async def close(self) -> None:
        """Leave."""
        await self._channels.close()
        self._child.close()


async def measure(client: Client, rounds: int) -> None:
    """Print both tables."""
    print("| requests at once | client, CPU ms a request: calls | line | server: calls | line |\n|---|---|---|---|---|")
    for width in WIDTHS:
        costs: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(rounds):
            for line, found in costs.items():
                found.append(await client.cost_ms(width, line=line))
        cells = [f"{median(cost[side] for cost in costs[line]):.2f}" for side in (0, 1) for line in (False, True)]
        print(f"| {width} | {' | '.join(cells)} |", flush=True)
    print("\n| after 20 ms of nothing, ms: median (best) | calls | line |\n|---|---|---|")
    for name, ask in (("unary", client.route), ("first message of a stream, less a step", client.generate)):
        took: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(4 * rounds):
            for line, times in took.items():
                await asyncio.sleep(PAUSE_S)
                times.append(await ask(line=line) * 1e3)
        print(f"| {name} | {' | '.join(f'{median(took[line]):.2f} ({min(took[line]):.2f})' for line in took)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print(provenance.banner("bench.lines"), flush=True)
    parent, child = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(child,), daemon=True)
    server.start()

    async def run() -> None:
        client = Client(parent, await asyncio.to_thread(parent.recv))
        for line in (False, True):
            await client.cost_ms(1, line=line)
        await measure(client, rounds)
        await client.close()

    uvloop.run(run())
    server.join(5)


if __name__ == "__main__":
    main()
