"""A pipe: whole messages, in order, however the bytes come; and a line that ends with it."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from protos.forebay.v1 import decode_pb2, decode_pb2_grpc, line_pb2
from shared import rpc
from shared.errors import WorkerLost
from shared.line import pipe as pipes
from shared.line.pipe import LENGTH_BYTES, Pipe, Pipes
from shared.local_sockets import LocalSockets
from shared.telemetry import Telemetry
from tests.unit.silent import Silent

PATIENCE_S = 10.0


class Wire:
    """What an event loop gives a protocol."""

    def __init__(self) -> None:
        self.sent = b""
        self.is_over = False

    def write(self, data: bytes) -> None:
        assert not self.is_over
        self.sent += data

    def is_closing(self) -> bool:
        return self.is_over

    def close(self) -> None:
        self.is_over = True

    abort = close


def framed(*messages: bytes) -> bytes:
    return b"".join(len(message).to_bytes(LENGTH_BYTES, "little") + message for message in messages)


def opened() -> tuple[Pipe, Wire]:
    pipe, wire = Pipe(), Wire()
    pipe.connection_made(wire)
    return pipe, wire


@pytest.mark.parametrize("step", [1, 3, 7, 10_000])
async def test_messages_come_whole_and_in_order_however_the_bytes_do(step: int) -> None:
    said, heard = [b"", b"a", b"bcd" * 100, b"\0" * 5], list[bytes]()
    pipe, _ = opened()
    pipe.listen(heard.append)
    data = framed(*said)
    for at in range(0, len(data), step):
        pipe.data_received(data[at : at + step])
    assert heard == said


async def test_what_came_before_anybody_listened_is_heard_first() -> None:
    heard = list[bytes]()
    pipe, _ = opened()
    pipe.data_received(framed(b"1", b"2"))
    pipe.listen(heard.append)
    pipe.data_received(framed(b"3"))
    assert heard == [b"1", b"2", b"3"]


async def test_a_writer_waits_while_the_other_side_is_behind() -> None:
    pipe, wire = opened()
    pipe.pause_writing()
    writing = asyncio.create_task(pipe.write(line_pb2.OpenRequest(left=[1])))
    await asyncio.sleep(0)
    assert not wire.sent
    pipe.resume_writing()
    await writing
    assert wire.sent == framed(line_pb2.OpenRequest(left=[1]).SerializeToString())


async def test_what_is_not_to_wait_is_written_only_if_the_other_side_is_not_behind() -> None:
    pipe, wire = opened()
    pipe.pause_writing()
    assert not pipe.write_now(line_pb2.OpenRequest(left=[1]))
    assert not wire.sent
    pipe.resume_writing()
    assert pipe.write_now(line_pb2.OpenRequest(left=[1]))
    assert wire.sent == framed(line_pb2.OpenRequest(left=[1]).SerializeToString())


async def test_nothing_is_said_to_who_is_gone() -> None:
    pipe, wire = opened()
    pipe.pause_writing()
    writing = asyncio.create_task(pipe.write(line_pb2.OpenRequest(left=[1])))
    wire.close()
    pipe.connection_lost(None)
    await writing
    assert pipe.ended.done()
    assert not wire.sent


@pytest.mark.parametrize("wrong", [b"\xff\xff\xff\xff", framed(b"\xff")], ids=["no length", "no message"])
async def test_who_says_what_nobody_can_read_is_left(wrong: bytes) -> None:
    for listens_first in (True, False):
        pipe, wire = opened()
        if listens_first:
            pipe.listen(parse)
        pipe.data_received(wrong)
        pipe.listen(parse)
        assert wire.is_over


def parse(message: bytes) -> None:
    line_pb2.OpenRequest.FromString(message)


async def test_a_pipe_is_claimed_by_its_name_whichever_comes_first() -> None:
    known = Pipes()
    pipe = known.accept()
    pipe.connection_made(Wire())
    early = asyncio.create_task(known.claim("01" * pipes.NAME_BYTES, PATIENCE_S))
    await asyncio.sleep(0)
    pipe.data_received(framed(b"\x01" * pipes.NAME_BYTES))
    assert await early is pipe
    with pytest.raises(TimeoutError):
        await known.claim("02" * pipes.NAME_BYTES, 0.01)


class Recorded(LocalSockets):
    """Keeps what was dialled."""

    dialled: Pipe

    async def dial(self, address: str, make: Any) -> Any:
        pipe = await super().dial(address, make)
        assert isinstance(pipe, Pipe)
        self.dialled = pipe
        return pipe


async def test_the_end_of_a_pipe_is_the_end_of_its_line_at_both_ends(tmp_path: Path) -> None:
    local, decode, telemetry = Recorded(str(tmp_path)), Silent(), Telemetry("test", "test-1")
    server, channels = rpc.Server(telemetry, [], local), rpc.Channels(local=local)
    decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, server.grpc)
    stub = channels.stub(decode_pb2_grpc.DecodeServiceStub, f"127.0.0.1:{await server.start('127.0.0.1', 0)}")
    async with aclosing(rpc.stream(stub.Generate, decode_pb2.GenerateRequest())) as responses:
        await asyncio.wait_for(anext(responses), PATIENCE_S)
        local.dialled.close()
        with pytest.raises(WorkerLost):
            await asyncio.wait_for(anext(responses), PATIENCE_S)
    await asyncio.wait_for(decode.ended.wait(), PATIENCE_S)
    # The next call opens the next line, and its pipe.
    async with aclosing(rpc.stream(stub.Generate, decode_pb2.GenerateRequest())) as responses:
        await asyncio.wait_for(anext(responses), PATIENCE_S)
    await channels.close()
    await server.stop(0)
    telemetry.close()
