"""Answering a job over HTTP: whole or as server-sent events, for as long as the client listens."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from services.gateway.output import Delta
from services.gateway.request import Job
from services.gateway.rest_errors import response_of
from shared import rpc, telemetry
from shared.errors import Fault, Internal

log = logging.getLogger(__name__)

_EVENT_STREAM = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Writer(Protocol):
    """Writes the answer to one job: whole, from deltas that are kept, or as the events of a stream."""

    @property
    def is_long(self) -> bool:
        """Whether `whole` takes a while."""

    def note(self, delta: Delta) -> None:
        """Count a delta."""

    def keep(self, delta: Delta) -> None:
        """Remember a delta for `whole`."""

    def whole(self) -> bytes:
        """The body of an answer that is not streamed."""

    def chunk(self, delta: Delta) -> bytes:
        """The events for one delta."""

    def last(self) -> bytes:
        """The events that end a stream."""

    def broken(self, fault: Fault) -> bytes:
        """The events that end a stream amid which a fault came."""


class Answer:
    """An ASGI application that runs a job. Its status is sent with the first token: earlier faults have theirs."""

    def __init__(self, job: Job, run: Callable[[Job], AsyncGenerator[Delta, None]], writer: Writer) -> None:
        self._job, self._run, self._writer = job, run, writer
        self._started = False
        self.model = job.model.name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; cancel everything if the client goes away."""
        await while_connected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault: Fault
        try:
            with rpc.deadline(self._job.caller.timeout_s):
                await (self._stream(send) if self._job.options.stream else self._whole(scope, receive, send))
            return
        except Fault as error:
            log.info("fault %s: %s", error.reason, error.message)
            fault = error
        except Exception:
            log.exception("defect while answering")
            fault = Internal("internal error; the log of the gateway has the details")
        telemetry.failed(fault)
        if self._started:
            await _send_last(send, self._writer.broken(fault))
        else:
            await response_of(fault)(scope, receive, send)

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._run(self._job)) as deltas:
            async for delta in deltas:
                self._writer.note(delta)
                self._writer.keep(delta)
        write = self._writer.whole
        body = await asyncio.to_thread(write) if self._writer.is_long else write()
        await Response(body, media_type="application/json")(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        async with aclosing(self._run(self._job)) as deltas:
            async for delta in deltas:
                self._writer.note(delta)
                if delta.prompt_logprobs:
                    continue
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": list(_EVENT_STREAM)})
                await send({"type": "http.response.body", "body": self._writer.chunk(delta), "more_body": True})
        await _send_last(send, self._writer.last())


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work; cancel it when the client disconnects. The request's body must have been read."""
    working, gone = asyncio.current_task(), False
    assert working is not None

    def leave(listening: asyncio.Task[None]) -> None:
        nonlocal gone
        if not listening.cancelled():
            gone = working.cancel()

    listening = asyncio.create_task(_disconnect(receive))
    listening.add_done_callback(leave)
    try:
        await work
    except asyncio.CancelledError:
        if not gone or working.uncancel():  # somebody else wants the task to end
            raise
        log.info("the client went away")
    finally:
        listening.remove_done_callback(leave)
        listening.cancel()


async def _disconnect(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_last(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": False})
