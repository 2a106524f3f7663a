"""A peer behind a network that lets nothing through any more: no reset, no end, no answer."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from protos.forebay.v1 import decode_pb2, decode_pb2_grpc
from shared import rpc
from shared.errors import WorkerLost
from shared.local_sockets import LocalSockets
from shared.telemetry import Telemetry
from tests.unit.silent import Silent

PATIENCE_S = 20.0


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
async def network(servicer: Silent, sockets: Path | None = None) -> AsyncIterator[tuple[Network, str]]:
    """A server, and the address at which the network to it begins; its local socket is found under that, too."""
    telemetry = Telemetry("test", "test-1")
    server = rpc.Server(telemetry, [], LocalSockets(str(sockets or "")))
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server.grpc)
    port = await server.start("127.0.0.1", 0)
    made = Network(port)
    listener = await asyncio.start_server(made.carry, "127.0.0.1", 0)
    address = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    if sockets is not None:
        (sockets / f"{address}.sock").symlink_to(sockets / f"127.0.0.1:{port}.sock")
    try:
        yield made, address
    finally:
        listener.close()
        await made.close()
        await server.stop(0)
        telemetry.close()


@pytest.mark.parametrize("way", ["by itself", "over a line", "over a line with a pipe, which is not cut"])
async def test_both_ends_of_a_cut_network_notice(way: str, tmp_path: Path) -> None:
    sockets = tmp_path if "pipe" in way else None
    servicer, channels = Silent(), rpc.Channels(local=LocalSockets(str(sockets or "")))
    kind = decode_pb2_grpc.DecodeServiceStub
    async with network(servicer, sockets) as (between, address):
        stub: Any = channels.stub(kind, address) if "line" in way else kind(channels.to(address))
        async with aclosing(rpc.stream(stub.Generate, decode_pb2.GenerateRequest())) as responses:
            await asyncio.wait_for(anext(responses), PATIENCE_S)
            between.whole.clear()
            with pytest.raises(WorkerLost):
                await asyncio.wait_for(anext(responses), PATIENCE_S)
        await asyncio.wait_for(servicer.ended.wait(), PATIENCE_S)
        await channels.close()
