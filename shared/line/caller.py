"""The caller's end of a line: calls that look as if each had a stream of its own."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextvars import Context
from copy import copy
from itertools import count
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from protos.forebay.v1 import line_pb2, line_pb2_grpc
from shared import status
from shared.errors import Cancelled, DeadlineExceeded, Fault, Internal, InvalidRequest, Unsupported, WorkerLost
from shared.line import pipe as pipes
from shared.line.outbox import LONGEST_BYTES, Outbox
from shared.line.pipe import Pipe

Response = TypeVar("Response")

# What a callee may be ahead of the caller with one answer, as line.proto says; a token takes 20 to 40.
WINDOW_BYTES = 64 << 10
# When the stream beside a pipe has ended, what was said before is on its way over the pipe.
LAST_WORDS_S = 1.0


Dial = Callable[[], Awaitable[Pipe | None]]
"""Opens a pipe to the process at the other end; None if there is none to it."""


class Line:
    """The calls of this process to one other. The first one opens it, and the first one after its end again."""

    def __init__(self, channel: grpc.aio.Channel, dial: Dial) -> None:
        self._stub: Any = line_pb2_grpc.LineServiceStub(channel)
        self._dial = dial
        self._numbers = count(1)
        self._calls: dict[int, LineCall[Any]] = {}
        self._outbox: Outbox[line_pb2.OpenRequest] = Outbox(line_pb2.OpenRequest)
        self._open: asyncio.Task[None] | None = None

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Response],
        **_more: object,
    ) -> Callable[..., "LineCall[Response]"]:
        """As a channel's: generated stubs take a line for a channel."""

        def begin(
            request: object, *, timeout: float | None = None, metadata: Sequence[tuple[str, str]] = ()
        ) -> "LineCall[Response]":
            message = request_serializer(request)
            if len(message) > LONGEST_BYTES:
                raise InvalidRequest(f"a request of {len(message)} bytes is too long: {LONGEST_BYTES} may be")
            call = LineCall(self, next(self._numbers), response_deserializer, timeout)
            said = line_pb2.Call(number=call.number, method=method, request=message, timeout_s=timeout)
            for key, value in metadata:
                said.metadata[key] = value
            self._begin(call, said)
            return call

        return begin

    unary_stream = unary_unary

    def _begin(self, call: "LineCall[Any]", said: line_pb2.Call) -> None:
        if self._open is None:
            self._outbox = Outbox(line_pb2.OpenRequest)
            # Of no request: without its deadline, its id and its trace.
            self._open = asyncio.get_running_loop().create_task(self._run(self._outbox), context=Context())
        self._calls[call.number] = call
        self._outbox.add(len(said.request), lambda message: message.calls.append(said), at_once=True)

    def left(self, number: int) -> None:
        """Nobody waits for the answer to a call any more."""
        if self._calls.pop(number, None):
            self._outbox.add(0, lambda message: message.left.append(number))

    def ended(self, number: int) -> None:
        """The answer to a call is complete."""
        self._calls.pop(number, None)

    def taken(self, number: int, num_bytes: int) -> None:
        """The caller has taken so much more of an answer."""
        if number in self._calls:
            self._outbox.add(0, lambda message: message.taken.add(number=number, num_bytes=num_bytes))

    async def close(self) -> None:
        """End the line and all calls on it."""
        if self._open is not None:
            self._open.cancel()
            await asyncio.gather(self._open, return_exceptions=True)
        self._end(Cancelled("the line was closed"))  # also if it was closed before it began

    def _end(self, fault: Fault) -> None:
        self._open = None
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.end(copy(fault))

    async def _run(self, outbox: Outbox[line_pb2.OpenRequest]) -> None:
        """One line from its opening to its end, which is the end of all calls on it."""
        fault: Fault = WorkerLost("the process at the other end closed the line")
        try:
            await self._talk(outbox)
        except grpc.aio.AioRpcError as error:
            fault = _of_no_call(status.fault_of(error))
        except asyncio.CancelledError:
            fault = Cancelled("the line was closed")
            raise
        finally:
            self._end(fault)

    async def _talk(self, outbox: Outbox[line_pb2.OpenRequest]) -> None:
        """Over a pipe if there is one: its end, too, is the line's."""
        if (pipe := await self._dial()) is None:
            return await self._converse(self._stub.Open(), outbox)
        try:
            await self._over(pipe, outbox)
        finally:
            pipe.close()

    async def _over(self, pipe: Pipe, outbox: Outbox[line_pb2.OpenRequest]) -> None:
        stream = self._stub.Open(metadata=((pipes.KEY, pipe.introduce()),))
        pipe.listen(lambda message: self._hear(line_pb2.OpenResponse.FromString(message)))
        stopped = asyncio.ensure_future(self._converse(stream, outbox, pipe.write))
        outbox.write_now = pipe.write_now
        try:
            await asyncio.wait({stopped, pipe.ended}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                stopped.result()
                await asyncio.wait({pipe.ended}, timeout=LAST_WORDS_S)
        finally:
            stopped.cancel()
            await asyncio.gather(stopped, return_exceptions=True)

    async def _converse(
        self, stream: Any, outbox: Outbox[line_pb2.OpenRequest], write: Callable[[Any], Awaitable[None]] | None = None
    ) -> None:
        writing = asyncio.create_task(outbox.run(write or stream.write))
        try:
            while (said := await stream.read()) is not grpc.aio.EOF:
                self._hear(said)
        finally:
            writing.cancel()
            stream.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    def _hear(self, said: line_pb2.OpenResponse) -> None:
        for reply in said.replies:
            if call := self._calls.get(reply.number):
                call.take(reply)


def _of_no_call(fault: Fault) -> Fault:
    """What the fault that ended a line is to the calls on it: where none of them is to blame another process may do
    better. gRPC says "internal" of a write to a connection that has just broken."""
    if isinstance(fault, Unsupported):
        return WorkerLost("the process at the other end takes no lines (LineService): is it an older version?")
    if isinstance(fault, Internal):
        return WorkerLost(f"the line broke: {fault.message}")
    return fault


class LineCall(Generic[Response]):
    """One call. It is awaited for the only message of its answer, or iterated for all of them. Raises the fault that
    ends it, after the messages that came before. `cancel` leaves it."""

    def __init__(
        self, line: Line, number: int, parse: Callable[[bytes], Response], timeout_s: float | None = None
    ) -> None:
        self.number = number
        self._line, self._parse = line, parse
        self._messages: deque[bytes] = deque()
        self._num_taken = 0
        self._is_over = False
        self._fault: Fault | None = None
        self._news: asyncio.Future[None] | None = None
        loop = asyncio.get_running_loop()
        self._timer = None if timeout_s is None else loop.call_later(timeout_s, self._expire)

    def take(self, reply: line_pb2.Reply) -> None:
        """The next part of the answer came."""
        if reply.HasField("message"):
            self._messages.append(reply.message)
        if reply.HasField("status"):
            self._line.ended(self.number)
            self.end(status.read(reply.status) or Internal("a call ended without a reason") if reply.status else None)
        self._tell()

    def end(self, fault: Fault | None) -> None:
        """Nothing more will come."""
        if not self._is_over:
            self._is_over, self._fault = True, fault
            if self._timer is not None:
                self._timer.cancel()
            self._tell()

    def cancel(self) -> None:
        """Leave it, which ends it on the other side."""
        if not self._is_over:
            self._line.left(self.number)
            self.end(Cancelled("the caller left"))

    def _expire(self) -> None:
        self._line.left(self.number)
        self.end(DeadlineExceeded("the deadline has passed"))

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def __await__(self) -> Generator[Any, None, Response]:
        return self._only().__await__()

    async def _only(self) -> Response:
        try:
            async for message in self:
                return message
            raise Internal("the answer has no message")
        finally:
            self.cancel()

    def __aiter__(self) -> AsyncIterator[Response]:
        return self

    async def __anext__(self) -> Response:
        while not self._messages:
            if self._fault is not None:
                raise self._fault
            if self._is_over:
                raise StopAsyncIteration
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        message = self._messages.popleft()
        self._num_taken += len(message)
        if self._num_taken >= WINDOW_BYTES // 2:
            self._line.taken(self.number, self._num_taken)
            self._num_taken = 0
        try:
            return self._parse(message)
        except DecodeError:
            raise Internal("the answer cannot be read") from None
