"""gRPC, in one place: servers, channels, deadlines and trace context.

A handler raises a Fault; its caller, in another process, catches the same Fault (`shared/status.py`). Deadlines do not
travel by themselves in grpc.aio: the server side notes the deadline of the call it handles, and every call made
meanwhile ends by then. The calls of one process to another share a line (`shared/line`); a client's have a stream each.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from functools import partial
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection
from opentelemetry import propagate, trace
from opentelemetry.context import get_current

from protos.forebay.v1 import line_pb2, line_pb2_grpc
from shared import status, telemetry
from shared.errors import DeadlineExceeded, Fault, Internal
from shared.line.callee import Lines
from shared.line.caller import Line
from shared.line.pipe import Pipe
from shared.local_sockets import Listener, LocalSockets
from shared.telemetry import Telemetry

log = logging.getLogger(__name__)

REQUEST_ID_KEY = "x-request-id"
MAX_MESSAGE_BYTES = 64 << 20
# A peer that stops answering is noticed within 1.9 s: a silent connection is pinged after the first, but no connection
# more than once a second (`NextAllowedPingInterval` in gRPC's chttp2 transport), and the third is how long an answer
# may take. Both sides must agree that pings are welcome. The keepalive timeout alone does nothing for a process that is
# stopped, whose kernel still acknowledges what it receives: the ping timeout (a minute unless set) is what counts then.
# gRPC's own threads answer pings, which no Python code holds up: a busy process answers, one that gets no processor for
# so long does not.
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 400),
    ("grpc.keepalive_timeout_ms", 900),
    ("grpc.http2.ping_timeout_ms", 900),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
MESSAGES = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.max_send_message_length", MAX_MESSAGE_BYTES)]
CHANNEL_OPTIONS = [
    *KEEPALIVE,
    *MESSAGES,
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A restarted process has another address: the channel to the old one must not try for ever.
    ("grpc.client_idle_timeout_ms", 60_000),
]
SERVER_OPTIONS = [
    *KEEPALIVE,
    *MESSAGES,
    ("grpc.http2.min_ping_interval_without_data_ms", 200),
    ("grpc.so_reuseport", 0),
]

# A channel without a call gives its connection up after a minute, and is forgotten if nobody has used it for so long.
UNUSED_S = 300.0
CONNECTED = (grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.CONNECTING)

OURS = "/forebay."
LINE = line_pb2.DESCRIPTOR.services_by_name["LineService"]
OPEN = f"/{LINE.full_name}/Open"

Response = TypeVar("Response")

_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
_metadata: ContextVar[Mapping[str, Any]] = ContextVar("metadata", default=MappingProxyType({}))


# Deadlines ------------------------------------------------------------------------------------------------------------


def time_remaining() -> float | None:
    """Seconds until the deadline of the work at hand; None if it has none."""
    end = _deadline.get()
    return None if end is None else end - time.monotonic()


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """Give the work inside a deadline, or keep the earlier one that it has."""
    current = time_remaining()
    shortest = min((s for s in (seconds, current) if s is not None), default=None)
    token = _deadline.set(None if shortest is None else time.monotonic() + shortest)
    try:
        yield
    finally:
        _deadline.reset(token)


@contextmanager
def no_deadline() -> Iterator[None]:
    """Free the work inside of the deadline of what it was begun for: clearing up goes on when a request has ended."""
    token = _deadline.set(None)
    try:
        yield
    finally:
        _deadline.reset(token)


def _timeout(limit: float | None) -> float | None:
    """What a call may take: its own limit or what is left, whichever is shorter."""
    left = time_remaining()
    if left is None or (limit is not None and limit < left):
        left = limit
    if left is not None and left <= 0:
        raise DeadlineExceeded("the deadline has passed")
    return left


# Calling --------------------------------------------------------------------------------------------------------------


class Channels:
    """One channel and one line per address, with the stubs in use. Both reconnect by themselves, and are forgotten when
    they have no connection and nobody has used them for long: a process that is started again has another address.

    Lines to processes that listen on one of the `local` sockets say what they have to say there."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, local: LocalSockets | None = None) -> None:
        self._clock, self._local = clock, local or LocalSockets()
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._lines: dict[str, Line] = {}
        self._used_at: dict[str, float] = {}
        self._stubs: dict[tuple[Callable[[Any], Any], str], Any] = {}
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def addresses(self) -> Sequence[str]:
        """Where there is a channel to."""
        return list(self._channels)

    def to(self, address: str) -> grpc.aio.Channel:
        """The channel to host:port."""
        if address not in self._channels:
            self._forget_unused()
            self._channels[address] = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        self._used_at[address] = self._clock()
        return self._channels[address]

    def line(self, address: str) -> Line:
        """The line to host:port."""
        if address not in self._lines:
            self._lines[address] = Line(self.to(address), lambda: self._local.dial(address, Pipe))
        return self._lines[address]

    def stub(self, kind: Callable[[Any], Any], address: str) -> Any:
        """The stub, of this generated class, of the service at host:port, over the line to there. Making one for each
        call would cost 40 us."""
        if (kind, address) not in self._stubs:
            self._stubs[kind, address] = kind(self.line(address))
        self._used_at[address] = self._clock()
        return self._stubs[kind, address]

    def _forget_unused(self) -> None:
        """Close what nobody has used for long and has no connection; one with a call at work on it has."""
        long_ago = self._clock() - UNUSED_S
        for address in [address for address, at in self._used_at.items() if at < long_ago]:
            if self._channels[address].get_state() not in CONNECTED:
                self._closing.add(task := asyncio.create_task(_close(*self._forget(address))))
                task.add_done_callback(self._closing.discard)

    def _forget(self, address: str) -> tuple[Line | None, grpc.aio.Channel]:
        self._stubs = {key: stub for key, stub in self._stubs.items() if key[1] != address}
        del self._used_at[address]
        return self._lines.pop(address, None), self._channels.pop(address)

    async def close(self) -> None:
        """Close all."""
        for address in list(self._channels):
            await _close(*self._forget(address))
        if self._closing:
            await asyncio.wait(self._closing)


async def _close(line: Line | None, channel: grpc.aio.Channel) -> None:
    if line is not None:
        await line.close()
    await channel.close()


async def call(method: Callable[..., Awaitable[Response]], request: object, timeout_s: float | None = None) -> Response:
    """Make a unary call. Raises the Fault that the callee raised, or the one that the broken connection means."""
    try:
        return await method(request, timeout=_timeout(timeout_s), metadata=outgoing())
    except grpc.aio.AioRpcError as error:
        raise status.fault_of(error) from None


async def stream(
    method: Callable[..., AsyncIterator[Response]], request: object, timeout_s: float | None = None
) -> AsyncGenerator[Response, None]:
    """Make a server-streaming call; leaving the iterator early cancels it. Raises faults as `call` does.

    Use it inside `contextlib.aclosing`, so that leaving early does not wait for the garbage collector.
    """
    running: Any = method(request, timeout=_timeout(timeout_s), metadata=outgoing())
    try:
        async for response in running:
            yield response
    except grpc.aio.AioRpcError as error:
        raise status.fault_of(error) from None
    finally:
        running.cancel()


def outgoing() -> tuple[tuple[str, str], ...]:
    """The metadata of a call: trace and request id of the work at hand."""
    carrier: dict[str, str] = {}
    if get_current():  # empty, unless the work at hand has a span
        propagate.inject(carrier)
    if current := telemetry.request_id.get():
        carrier[REQUEST_ID_KEY] = current
    return tuple(carrier.items())


# Serving --------------------------------------------------------------------------------------------------------------


class Server:
    """A gRPC server with health, reflection, faults, deadlines and spans."""

    def __init__(
        self,
        telemetry: Telemetry,
        service_names: Sequence[str],
        local: LocalSockets | None = None,
        *,
        takes_lines: bool = True,
    ) -> None:
        """`takes_lines` is for processes that others of ours call; a face for users has only what users may call."""
        self._lines, self._local = Lines(), local or LocalSockets()
        self._listener: Listener | None = None
        interceptor = _Interceptor(telemetry, self._lines)
        self.grpc = grpc.aio.server(interceptors=[interceptor], options=SERVER_OPTIONS)
        others = [health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME]
        if takes_lines:
            servicer: Any = self._lines
            line_pb2_grpc.add_LineServiceServicer_to_server(servicer, self.grpc)
            others.append(LINE.full_name)
        self._health = health.HealthServicer()
        self._service_names = ("", *service_names)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection((*service_names, *others), self.grpc)

    async def start(self, host: str, port: int, *, serving: bool = True) -> int:
        """Listen, healthy unless that has to wait; return the port. Raises OSError if it cannot.

        For lines it listens on a local socket, too, if it can.
        """
        try:
            bound = self.grpc.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise OSError(
                f"cannot listen on {host}:{port}; is the port taken, or the host another machine's?"
            ) from error
        self._listener = await self._local.listen(f"{host}:{bound}", self._lines.pipes.accept)
        await self.grpc.start()
        await self.set_serving(serving)
        return bound

    async def set_serving(self, serving: bool) -> None:
        """What the health service answers, for each service and for the whole server."""
        state = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in self._service_names:
            await self._health.set(name, state)

    async def stop(self, grace_s: float) -> None:
        """Take no new calls, give the running ones `grace_s` seconds, then cancel them."""
        await self.set_serving(False)
        if self._listener is not None:
            self._listener.close()
        await asyncio.gather(self._lines.stop(grace_s), self.grpc.stop(grace_s))


def metadata(key: str) -> str:
    """What the call at hand brought under a key; empty if nothing."""
    return str(_metadata.get().get(key, ""))


class _Interceptor(grpc.aio.ServerInterceptor):
    """Puts every handler of ours inside what `_Begin` sets up, whether its call came by itself or over a line."""

    def __init__(self, telemetry: Telemetry, lines: Lines) -> None:
        self._telemetry, self._lines = telemetry, lines
        self._ours: dict[str, Any] = {}
        """Handlers by method, made at its first call: making one anew costs each call 50 us."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        if handler := self._ours.get(details.method):
            return handler
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OURS):
            return handler
        if details.method == OPEN:

            async def find(method: str) -> Any:
                if handler := self._ours.get(method):
                    return handler
                sought = type(details)(method, ())
                return await self.intercept_service(continuation, sought) if method.startswith(OURS) else None

            self._ours[OPEN] = handler._replace(stream_stream=partial(self._lines.Open, find=find))
        else:
            self._ours[details.method] = self._guarded(handler, details.method)
        return self._ours[details.method]

    def _guarded(self, handler: Any, method: str) -> Any:
        begin = _Begin(self._telemetry, method)
        if handler.response_streaming:
            return handler._replace(unary_stream=_guard_stream(handler.unary_stream, begin))
        return handler._replace(unary_unary=_guard_unary(handler.unary_unary, begin))


class _Begin:
    """What is set up before a handler runs. Each call has a task, and so a context, of its own: nothing is undone."""

    def __init__(self, telemetry: Telemetry, method: str) -> None:
        self._telemetry = telemetry
        service, _, method = method.removeprefix("/").partition("/")
        self._name = f"{service}/{method}"
        self._about = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}

    def __call__(self, context: Any) -> trace.Span:
        """Set deadline, metadata, request id and trace context of this task; return the call's span."""
        metadata = dict(context.invocation_metadata() or ())
        _metadata.set(metadata)
        remaining = context.time_remaining()
        _deadline.set(None if remaining is None else time.monotonic() + remaining)
        telemetry.request_id.set(str(metadata.get(REQUEST_ID_KEY, "")))
        return self._telemetry.begin(self._name, metadata, self._about)


def _guard_unary(handler: Any, begin: _Begin) -> Any:
    async def guarded(request: Any, context: Any) -> Any:
        span = begin(context)
        try:
            return await handler(request, context)
        except Exception as error:
            await _refuse(context, error)
        finally:
            span.end()

    return guarded


def _guard_stream(handler: Any, begin: _Begin) -> Any:
    # Not a generator itself: when a call is cancelled grpc.aio drops a handler's generator where it stands, and its
    # `finally` would wait for the garbage collector. This way cancelling closes the handler at once.
    async def guarded(request: Any, context: Any) -> None:
        span = begin(context)
        try:
            async with aclosing(handler(request, context)) as responses:
                async for response in responses:
                    await context.write(response)
        except Exception as error:
            await _refuse(context, error)
        finally:
            span.end()

    return guarded


async def _refuse(context: Any, error: Exception) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, Fault):
        log.info("fault %s: %s", error.reason, error.message)
        fault = error
    elif isinstance(error, asyncio.TimeoutError):
        fault = DeadlineExceeded("the deadline has passed")
    else:
        log.error("defect in a handler", exc_info=error)
        fault = Internal("internal error; the log of the process has the details")
    telemetry.failed(fault)
    code, details = grpc.StatusCode[fault.grpc_status], status.write(fault)
    await context.abort(code, fault.message, trailing_metadata=((status.DETAILS_KEY, details),))
    raise AssertionError("abort returned")
