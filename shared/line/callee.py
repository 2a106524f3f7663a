"""The callee's end of a line: each call on it is answered by the handler that a call of its own would have."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from protos.forebay.v1 import line_pb2
from shared import status
from shared.errors import Draining, Fault, Internal, InvalidRequest, Unsupported
from shared.line import pipe as pipes
from shared.line.caller import WINDOW_BYTES
from shared.line.outbox import LONGEST_BYTES, Outbox
from shared.line.pipe import Pipe, Pipes

log = logging.getLogger(__name__)

# A caller opens its pipe before its line, and both go to the same event loop.
PIPE_S = 5.0

Replies = Outbox[line_pb2.OpenResponse]
Find = Callable[[str], Awaitable[Any]]
"""The handler for a method; None for one that nobody wrote."""


async def _nobody(_method: str) -> None:
    """No handler."""


class Lines:
    """The lines that other processes have open to this one."""

    def __init__(self) -> None:
        self.pipes = Pipes()
        self._open: set[_Line] = set()
        self._is_closing = False

    async def Open(self, said: AsyncIterator[line_pb2.OpenRequest], context: Any, find: Find = _nobody) -> None:
        """Answer the calls on one line until its caller, or this process, ends it; see the protocol."""
        name = dict(context.invocation_metadata() or ()).get(pipes.KEY)
        try:
            pipe = await self.pipes.claim(str(name), PIPE_S) if name else None
        except TimeoutError:
            log.warning("a line came without the pipe that it names")
            return
        line = _Line(find, context, pipe)
        self._open.add(line)
        if self._is_closing:
            line.close()
        try:
            await line.run(said)
        finally:
            self._open.discard(line)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, give the running ones `grace_s` seconds, and end all lines."""
        self._is_closing = True
        for line in self._open:
            line.refuses = True
        if answers := [answer for line in self._open for answer in line.answering]:
            await asyncio.wait(answers, timeout=grace_s)
        for line in self._open:
            line.close()
        self.pipes.close()


class _Line:
    """One line."""

    def __init__(self, find: Find, context: Any, pipe: Pipe | None) -> None:
        self.refuses = False
        self._find, self._write, self._pipe = find, pipe.write if pipe else context.write, pipe
        self._replies: Replies = Outbox(line_pb2.OpenResponse)
        if pipe is not None:
            self._replies.write_now = pipe.write_now
        self._answers: dict[int, _Answer] = {}
        self._closed = asyncio.Event()

    @property
    def answering(self) -> list[asyncio.Task[None]]:
        """The tasks of the calls that run."""
        return [answer.task for answer in self._answers.values()]

    def close(self) -> None:
        """Make `run` return."""
        self._closed.set()

    async def run(self, said: AsyncIterator[line_pb2.OpenRequest]) -> None:
        """Answer until either side ends the line, then cancel what still runs."""
        work = (self._listen(said), self._replies.run(self._write), self._until_closed())
        ends = [asyncio.create_task(each) for each in work]
        if self._pipe is not None:
            self._pipe.ended.add_done_callback(lambda _ended: self.close())
            self._pipe.listen(lambda message: self._hear(line_pb2.OpenRequest.FromString(message)))
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if self._pipe is not None:
                self._pipe.close()
            left = [*ends, *self.answering]
            for task in left:
                task.cancel()
            for found in await asyncio.gather(*left, return_exceptions=True):
                if isinstance(found, Exception):
                    log.info("a line broke: %r", found)

    async def _until_closed(self) -> None:
        """Closed, and what was said before is sent."""
        await self._closed.wait()
        await self._replies.written(self._replies.last)

    async def _listen(self, said: AsyncIterator[line_pb2.OpenRequest]) -> None:
        async for message in said:
            self._hear(message)

    def _hear(self, message: line_pb2.OpenRequest) -> None:
        for call in message.calls:
            self._begin(call)
        for number in message.left:
            if answer := self._answers.get(number):
                answer.task.cancel()
        for taken in message.taken:
            if answer := self._answers.get(taken.number):
                answer.taken(taken.num_bytes)

    def _begin(self, call: line_pb2.Call) -> None:
        answer = _Answer(self._replies, call)
        if self.refuses:
            answer.end(Draining("this process is shutting down"))
        elif call.number in self._answers:
            answer.end(InvalidRequest(f"call {call.number} is running already"))
        else:
            self._answers[call.number] = answer
            answer.task = asyncio.create_task(answer.run(self._find))
            answer.task.add_done_callback(lambda _task: self._answers.pop(call.number, None))


class _Answer:
    """The answer to one call; to its handler, the context of a call of its own."""

    task: asyncio.Task[None]

    def __init__(self, replies: Replies, call: line_pb2.Call) -> None:
        self._replies, self._call = replies, call
        self._num_ahead = self._last = 0
        self._has_spoken = False
        self._status = b""
        self._serialize: Callable[[Any], bytes] = bytes
        self._was_taken = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._until = loop.time() + call.timeout_s if call.HasField("timeout_s") else None

    async def run(self, find: Find) -> None:
        """Have the handler answer. Its caller knows by itself when the deadline passes."""
        loop = asyncio.get_running_loop()
        expire = None if self._until is None else loop.call_at(self._until, self.task.cancel)
        try:
            last = await self._handled(find)
        except grpc.aio.AbortError:
            self._say(status=self._status)
        except Fault as fault:
            self.end(fault)
        except Exception:
            log.exception("defect in a line")
            self.end(Internal("internal error; the log of the process has the details"))
        else:
            self._say(message=last, status=b"")
        finally:
            if expire is not None:
                expire.cancel()

    async def _handled(self, find: Find) -> bytes | None:
        """The last message, if the handler did not write it."""
        method = self._call.method
        handler = await find(method)
        if handler is None or handler.request_streaming:
            raise Unsupported(f"no method {method} that takes one message")
        try:
            request = handler.request_deserializer(self._call.request)
        except DecodeError:
            raise InvalidRequest(f"the request for {method} cannot be read") from None
        self._serialize = handler.response_serializer
        if handler.response_streaming:
            await handler.unary_stream(request, self)
            return None
        return self._written(await handler.unary_unary(request, self))

    def _written(self, message: Any) -> bytes:
        serialized = self._serialize(message)
        if len(serialized) > LONGEST_BYTES:
            raise Internal(f"an answer of {len(serialized)} bytes is too long: {LONGEST_BYTES} may be")
        return serialized

    def end(self, fault: Fault) -> None:
        """Say why there is no (more) answer."""
        self._say(status=status.write(fault))

    def taken(self, num_bytes: int) -> None:
        """The caller took more."""
        self._num_ahead -= num_bytes
        self._was_taken.set()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """What the call brought; as gRPC's context."""
        metadata = self._call.metadata
        return tuple((key, metadata[key]) for key in metadata)

    def time_remaining(self) -> float | None:
        """Seconds until the deadline; as gRPC's context."""
        return None if self._until is None else self._until - asyncio.get_running_loop().time()

    async def write(self, message: Any) -> None:
        """Send one message, when the one before is sent and the caller has not too much to take; as gRPC's context."""
        await self._replies.written(self._last)
        while self._num_ahead >= WINDOW_BYTES:
            self._was_taken.clear()
            await self._was_taken.wait()
        serialized = self._written(message)
        self._num_ahead += len(serialized)
        self._say(message=serialized)

    async def abort(
        self, _code: grpc.StatusCode, _details: str, trailing_metadata: Sequence[tuple[str, bytes]]
    ) -> NoReturn:
        """End with a fault; as gRPC's context."""
        self._status = dict(trailing_metadata)[status.DETAILS_KEY]
        raise grpc.aio.AbortError

    def _say(self, **said: bytes | None) -> None:
        """The first thing, a first token or the whole answer, goes at once after a silence; others may gather."""
        num_bytes, number = sum(map(len, filter(None, said.values()))), self._call.number
        at_once, self._has_spoken = not self._has_spoken, True
        self._replies.add(num_bytes, lambda message: message.replies.add(number=number, **said), at_once=at_once)
        self._last = self._replies.last
