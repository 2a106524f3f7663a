"""A line: many calls over one stream, none of which holds up another or outlives its caller."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from cli.ports import Reserved
from protos.forebay.v1 import decode_pb2, decode_pb2_grpc, generation_pb2, kv_pb2, kv_pb2_grpc, line_pb2, line_pb2_grpc
from shared import rpc
from shared.errors import Cancelled, DeadlineExceeded, Draining, InvalidRequest, Unsupported, WorkerLost
from shared.line.caller import WINDOW_BYTES
from shared.line.outbox import LONGEST_BYTES, MAX_BYTES, SILENCE_S, Outbox
from shared.local_sockets import LocalSockets
from shared.telemetry import Telemetry
from tests.unit.clock import Clock

PATIENCE_S = 10.0


class Decode(decode_pb2_grpc.DecodeServiceServicer):
    """Sends as many tokens as are asked for, then waits until it may end."""

    def __init__(self) -> None:
        self.num_sent: dict[str, int] = {}
        self.ended: dict[str, asyncio.Event] = {}
        self.may_end = asyncio.Event()

    def end_of(self, request_id: str) -> asyncio.Event:
        return self.ended.setdefault(request_id, asyncio.Event())

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[decode_pb2.GenerateResponse]:
        try:
            for token_id in range(128, 128 + request.sampling.max_tokens):  # ids of two bytes
                yield decode_pb2.GenerateResponse(tokens=generation_pb2.TokenChunk(token_ids=[token_id] * 100))
                self.num_sent[request.request_id] = token_id - 127
            await self.may_end.wait()
        finally:
            self.end_of(request.request_id).set()


class Kv(kv_pb2_grpc.KvServiceServicer):
    """Answers at once."""

    async def Renew(self, request: Any, context: Any) -> kv_pb2.RenewResponse:
        return kv_pb2.RenewResponse(lease=kv_pb2.Lease(lease_id=request.lease_id))

    async def Acquire(self, request: Any, context: Any) -> kv_pb2.AcquireResponse:
        return kv_pb2.AcquireResponse()

    async def Connect(self, request: Any, context: Any) -> kv_pb2.ConnectResponse:
        return kv_pb2.ConnectResponse()

    async def Release(self, request: Any, context: Any) -> kv_pb2.ReleaseResponse:
        return kv_pb2.ReleaseResponse()


class World:
    """A server, and a caller with a line to it."""

    def __init__(self, local: LocalSockets) -> None:
        self._local = local
        self.port = Reserved("127.0.0.1")  # nobody else gets it between two starts
        self.decode, self.telemetry, self.channels = Decode(), Telemetry("test", "test-1"), rpc.Channels(local=local)
        self.server, self.address = self._server(), ""

    def _server(self) -> rpc.Server:
        server = rpc.Server(self.telemetry, [], self._local)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(self.decode, server.grpc)
        kv_pb2_grpc.add_KvServiceServicer_to_server(Kv(), server.grpc)
        return server

    async def start(self) -> None:
        self.address = f"127.0.0.1:{await self.server.start('127.0.0.1', self.port.number)}"

    async def restart(self) -> None:
        await self.server.stop(0)
        self.server = self._server()
        await self.start()

    def generate(self, request_id: str, num_tokens: int, timeout_s: float | None = None) -> Any:
        request = decode_pb2.GenerateRequest(request_id=request_id)
        request.sampling.max_tokens = num_tokens
        return rpc.stream(self.stub(decode_pb2_grpc.DecodeServiceStub).Generate, request, timeout_s)

    async def renew(self, lease_id: int) -> int:
        method = self.stub(kv_pb2_grpc.KvServiceStub).Renew
        answer: kv_pb2.RenewResponse = await rpc.call(method, kv_pb2.RenewRequest(lease_id=lease_id), PATIENCE_S)
        return answer.lease.lease_id

    def stub(self, kind: Any) -> Any:
        return self.channels.stub(kind, self.address)


@pytest.fixture(params=["by a stream", "by a pipe"])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    world = World(LocalSockets(str(tmp_path) if "pipe" in request.param else ""))
    await world.start()
    yield world
    await world.channels.close()
    await world.server.stop(0)
    world.telemetry.close()
    world.port.close()


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - the other side of a wire tells nobody
            await asyncio.sleep(0.005)


def leaving(number: int) -> Callable[[line_pb2.OpenRequest], None]:
    return lambda message: message.left.append(number)


async def test_what_is_said_while_a_message_is_written_goes_into_the_next_one() -> None:
    outbox, written, may_write = Outbox(line_pb2.OpenRequest), [], asyncio.Event()

    async def write(message: line_pb2.OpenRequest) -> None:
        written.append(list(message.left))
        await may_write.wait()

    writing = asyncio.create_task(outbox.run(write))
    for number in (1, 2):
        outbox.add(0, leaving(number))
    await until(lambda: written == [[1, 2]])
    for number in (3, 4, 5):
        outbox.add(0, leaving(number))
    may_write.set()
    await asyncio.wait_for(outbox.written(outbox.last), PATIENCE_S)
    assert written == [[1, 2], [3, 4, 5]]
    writing.cancel()


async def test_a_long_thing_has_a_message_of_its_own() -> None:
    outbox = Outbox(line_pb2.OpenRequest)
    messages = list[line_pb2.OpenRequest]()
    for num_bytes in (10, MAX_BYTES, 10):
        outbox.add(num_bytes, messages.append)
    assert len({id(message) for message in messages}) == 3


def writing_at_once() -> tuple[Clock, Outbox[line_pb2.OpenRequest], list[list[int]]]:
    """An outbox whose messages can be written without waiting, and what they say."""
    clock, written = Clock(), list[list[int]]()
    outbox = Outbox(line_pb2.OpenRequest, clock)

    def write_now(message: line_pb2.OpenRequest) -> bool:
        written.append(list(message.left))
        return True

    outbox.write_now = write_now
    return clock, outbox, written


async def test_what_is_said_at_once_is_written_before_the_turn_ends_behind_what_waits_already() -> None:
    clock, outbox, written = writing_at_once()
    outbox.add(0, leaving(1))
    assert written == []
    clock.now += SILENCE_S
    outbox.add(0, leaving(2), at_once=True)
    assert written == [[1, 2]]
    await asyncio.wait_for(outbox.written(outbox.last), PATIENCE_S)


async def test_on_a_line_that_is_busy_nothing_is_said_at_once() -> None:
    clock, outbox, written = writing_at_once()
    for number in range(4):
        outbox.add(0, leaving(number), at_once=True)
        clock.now += 0.9 * SILENCE_S
    assert written == [[0]]
    clock.now += SILENCE_S
    outbox.add(0, leaving(4), at_once=True)
    assert written == [[0], [1, 2, 3, 4]]


async def test_what_is_said_at_once_waits_for_what_is_being_written() -> None:
    clock, written, may_write = Clock(), list[list[int]](), asyncio.Event()
    outbox = Outbox(line_pb2.OpenRequest, clock)

    async def write(message: line_pb2.OpenRequest) -> None:
        await may_write.wait()
        written.append(list(message.left))

    def write_now(message: line_pb2.OpenRequest) -> bool:
        written.append([*message.left, -1])
        return True

    writing = asyncio.create_task(outbox.run(write))
    outbox.add(0, leaving(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    outbox.write_now = write_now
    clock.now += SILENCE_S
    outbox.add(0, leaving(2), at_once=True)
    assert written == []
    may_write.set()
    await until(lambda: written == [[1], [2]])
    writing.cancel()


async def test_many_calls_at_once_each_get_their_own_answer(world: World) -> None:
    assert await asyncio.gather(*map(world.renew, range(50))) == list(range(50))


async def test_a_caller_that_takes_nothing_holds_up_nobody_and_is_sent_no_more_than_the_window(world: World) -> None:
    async with aclosing(world.generate("slow", 10_000)) as slow:
        num_bytes = (await anext(slow)).ByteSize()
        in_window = -(-WINDOW_BYTES // num_bytes)
        await until(lambda: world.decode.num_sent["slow"] == in_window)
        assert await asyncio.gather(*map(world.renew, range(20))) == list(range(20))
        assert world.decode.num_sent["slow"] == in_window
        for token_id in range(129, 128 + 3 * in_window):  # it goes on when something is taken
            assert (await anext(slow)).tokens.token_ids[0] == token_id


async def test_leaving_one_call_ends_no_other(world: World) -> None:
    async with aclosing(world.generate("stays", 1)) as stays:
        await anext(stays)
        async with aclosing(world.generate("leaves", 1)) as leaves:
            await anext(leaves)
        await asyncio.wait_for(world.decode.end_of("leaves").wait(), PATIENCE_S)
        assert not world.decode.end_of("stays").is_set()
        world.decode.may_end.set()
        assert [response async for response in stays] == []


async def test_a_deadline_ends_the_call_on_both_sides(world: World) -> None:
    async with aclosing(world.generate("late", 1, 0.1)) as responses:
        await anext(responses)
        with pytest.raises(DeadlineExceeded):
            await anext(responses)
    await asyncio.wait_for(world.decode.end_of("late").wait(), PATIENCE_S)


async def test_a_callee_that_is_gone_ends_all_calls_and_the_next_call_opens_a_new_line(world: World) -> None:
    streams = [world.generate(str(number), 1) for number in range(3)]
    for responses in streams:
        await anext(responses)
    await world.restart()
    for responses in streams:
        with pytest.raises(WorkerLost):
            await anext(responses)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert await world.renew(5) == 5
            except WorkerLost:  # the channel tries again in a moment
                await asyncio.sleep(0.05)
            else:
                break


class Broken(line_pb2_grpc.LineServiceServicer):
    """A line that ends as gRPC ends one that is written to when its connection has just broken."""

    async def Open(self, request_iterator: Any, context: Any) -> AsyncIterator[line_pb2.OpenResponse]:
        async for _ in request_iterator:
            await context.abort(grpc.StatusCode.INTERNAL, "Internal error from Core")
            yield line_pb2.OpenResponse()


@pytest.mark.parametrize(
    ("add", "reason"),
    [
        (lambda server: kv_pb2_grpc.add_KvServiceServicer_to_server(Kv(), server), "takes no lines|Internal error"),
        (lambda server: line_pb2_grpc.add_LineServiceServicer_to_server(Broken(), server), "the line broke"),
    ],
    ids=["none is taken", "it broke"],
)
async def test_a_line_that_fails_by_itself_is_a_callee_that_is_not_there(
    add: Callable[[grpc.aio.Server], None], reason: str, world: World
) -> None:
    """Where it is refused while it is written to, gRPC says that in its own way."""
    callee = grpc.aio.server()
    add(callee)
    address = f"127.0.0.1:{callee.add_insecure_port('127.0.0.1:0')}"
    await callee.start()
    stub = world.channels.stub(kv_pb2_grpc.KvServiceStub, address)
    try:
        with pytest.raises(WorkerLost, match=reason):
            await rpc.call(stub.Renew, kv_pb2.RenewRequest(), PATIENCE_S)
    finally:
        await callee.stop(0)


async def test_a_caller_that_is_gone_ends_its_calls(world: World) -> None:
    responses = world.generate("left", 1)
    await anext(responses)
    await world.channels.close()
    await asyncio.wait_for(world.decode.end_of("left").wait(), PATIENCE_S)
    await responses.aclose()


async def test_a_line_that_is_closed_before_it_began_ends_its_calls(world: World) -> None:
    waiting = asyncio.create_task(world.renew(1))
    await asyncio.sleep(0)
    await world.channels.close()
    with pytest.raises(Cancelled):
        await asyncio.wait_for(waiting, PATIENCE_S)


async def test_a_server_that_stops_lets_calls_end_and_takes_no_new_ones(world: World) -> None:
    async with aclosing(world.generate("last", 1)) as responses:
        await anext(responses)
        stopping = asyncio.create_task(world.server.stop(PATIENCE_S))
        await asyncio.sleep(0)  # it has begun to stop
        with pytest.raises(Draining):
            await world.renew(1)
        assert not stopping.done()
        world.decode.may_end.set()
        assert [response async for response in responses] == []
        await asyncio.wait_for(stopping, PATIENCE_S)


async def test_a_server_that_stops_gives_up_what_does_not_end(world: World) -> None:
    async with aclosing(world.generate("endless", 1)) as responses:
        await anext(responses)
        await asyncio.wait_for(world.server.stop(0.05), PATIENCE_S)
        await asyncio.wait_for(world.decode.end_of("endless").wait(), PATIENCE_S)
        with pytest.raises(WorkerLost):
            await anext(responses)


async def test_a_request_that_no_message_holds_is_refused_alone(world: World) -> None:
    async with aclosing(world.generate("beside", 1)) as responses:
        await anext(responses)
        with pytest.raises(InvalidRequest, match="too long"):
            await anext(world.generate("x" * LONGEST_BYTES, 1))
        world.decode.may_end.set()
        assert [response async for response in responses] == []


@pytest.mark.parametrize(
    ("method", "request_bytes", "fault"),
    [
        ("/forebay.v1.KvService/Nothing", b"", Unsupported),
        ("/forebay.v1.LineService/Open", b"", Unsupported),
        ("/grpc.health.v1.Health/Check", b"", Unsupported),
        ("/forebay.v1.KvService/Renew", b"\xff", InvalidRequest),
    ],
)
async def test_a_call_that_means_nothing_ends_with_a_reason(
    world: World, method: str, request_bytes: bytes, fault: type[Exception]
) -> None:
    line: Any = world.channels.line(world.address)
    with pytest.raises(fault):
        await rpc.call(line.unary_unary(method, lambda _: request_bytes, bytes), None, PATIENCE_S)
    assert await world.renew(3) == 3
