"""A peer behind a network that lets nothing through any more: no reset, no end, no answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from protos.forebay.v1 import decode_pb2, decode_pb2_grpc
from shared import rpc
from shared.errors import WorkerLost
from shared.telemetry import Telemetry

PATIENCE_S = 20.0


class Silent(decode_pb2_grpc.DecodeServiceServicer):
    """Sends one message and then computes for ever."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.GenerateResponse]:
        try:
            yield decode_pb2.GenerateResponse()
            await asyncio.sleep(10 * PATIENCE_S)
        finally:
            self.ended.set()


class Network:
    """Carries bytes between a client and a server until it is cut; connections stay open then."""

    def __init__(self, port: int) -> None:
        self._port, self._tasks = port, set[asyncio.Task[None]]()
        self._writers: list[asyncio.StreamWriter] = []
        self.whole = asyncio.Event()
        self.whole.set()

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, back]
        self._tasks |= {asyncio.create_task(self._pump(reader, back)), asyncio.create_task(self._pump(there, writer))}

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while some := await reader.read(65_536):
            await self.whole.wait()
            writer.write(some)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.close()


@asynccontextmanager
async def network(servicer: Silent) -> AsyncIterator[tuple[Network, str]]:
    """A server, and the address at which the network to it begins."""
    telemetry = Telemetry("test", "test-1")
    server = rpc.Server(telemetry, [])
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server.grpc)
    made = Network(await server.start("127.0.0.1", 0))
    listener = await asyncio.start_server(made.carry, "127.0.0.1", 0)
    try:
        yield made, f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        await made.close()
        await server.stop(0)
        telemetry.close()


@pytest.mark.parametrize("over_a_line", [False, True])
async def test_both_ends_of_a_cut_network_notice(over_a_line: bool) -> None:
    servicer, channels, kind = Silent(), rpc.Channels(), decode_pb2_grpc.DecodeServiceStub
    async with network(servicer) as (between, address):
        stub: Any = channels.stub(kind, address) if over_a_line else kind(channels.to(address))
        async with aclosing(rpc.stream(stub.Generate, decode_pb2.GenerateRequest())) as responses:
            await asyncio.wait_for(anext(responses), PATIENCE_S)
            between.whole.clear()
            with pytest.raises(WorkerLost):
                await asyncio.wait_for(anext(responses), PATIENCE_S)
        await asyncio.wait_for(servicer.ended.wait(), PATIENCE_S)
        await channels.close()
