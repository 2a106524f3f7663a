"""A gateway process: both faces on one event loop, from start to the end of its drain."""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from protos.forebay.v1 import gateway_pb2_grpc
from services.gateway.api_keys import ApiKeys
from services.gateway.config import GatewayConfig
from services.gateway.core import Core
from services.gateway.directory import Directory, follow
from services.gateway.dispatch import Dispatcher
from services.gateway.meters import Meters
from services.gateway.parsers.formats import Formats
from services.gateway.rest import REQUEST_ID, Rest
from services.gateway.servicer import SERVICE, GatewayServicer
from shared import gentle_start, rpc, telemetry
from shared.blackboard.board import Blackboard
from shared.blackboard.heartbeat import Heartbeat, await_epoch
from shared.blackboard.records import Registration, Role
from shared.errors import InvalidRequest
from shared.local_sockets import LocalSockets
from shared.telemetry import Telemetry

log = logging.getLogger(__name__)

# How old the time in an answer's Date header may be: it has whole seconds.
DATE_S = 1.0


async def run(config: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Raises OSError for a taken port, InvalidRequest for a wrong path."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    name = config.name or f"gateway-{socket.gethostname()}-{config.http_port}"
    telemetry_, metrics_port = telemetry.start("gateway", name, config)
    async with AsyncExitStack() as stack:
        stack.callback(telemetry_.close)
        board = Blackboard(config.redis_url)
        stack.push_async_callback(board.close)
        channels = rpc.Channels(local=LocalSockets(config.local_sockets))
        stack.push_async_callback(channels.close)
        formats = Formats(config.reasoning_parser, config.tool_parser)
        directory = Directory(text_paths(config.tokenizer), formats)
        meters = Meters(telemetry_.meter)
        dispatcher = Dispatcher(directory, channels, meters, config.recovery_wait_ms)
        stack.push_async_callback(dispatcher.settled)
        core = Core(directory, dispatcher, meters, config.max_choices)
        await _serve(config, name, metrics_port, core, telemetry_, board, stop)


async def _serve(
    config: GatewayConfig,
    name: str,
    metrics_port: int,
    core: Core,
    telemetry_: Telemetry,
    board: Blackboard,
    stop: asyncio.Event,
) -> None:
    interval_ms, ttl_ms = config.blackboard_interval_ms, config.registration_ttl_ms
    following = asyncio.create_task(follow(board, core.directory, interval_ms, ttl_ms))
    await core.directory.changed(interval_ms / 1000)  # who comes first must not be told that nobody is there
    http, http_port = rest_server(config, core, telemetry_)
    grpc_server = rpc.Server(telemetry_, [SERVICE], takes_lines=False)
    servicer = GatewayServicer(core, ApiKeys(config.api_key), config.request_timeout_ms)
    gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, grpc_server.grpc)
    grpc_port = await grpc_server.start(config.host, config.port)
    serving = asyncio.create_task(http.serve())
    log.info("serving REST at http://%s:%d and gRPC at %s:%d", config.host, http_port, config.host, grpc_port)
    epoch = await await_epoch(board, name, config.heartbeat_ms, stop)
    gc.freeze()  # what start-up made is there to stay: to look through it at a full collection takes 0.1 s
    stopping = asyncio.create_task(stop.wait())
    heartbeat = None
    if epoch is not None:

        def describe() -> Registration:
            return Registration(
                role=Role.GATEWAY,
                name=name,
                epoch=epoch,
                pid=os.getpid(),
                address=f"{config.host}:{grpc_port}",
                metrics_address=f"{config.host}:{metrics_port}",
                http_address=f"{config.host}:{http_port}",
                draining=core.draining,
            )

        heartbeat = Heartbeat(
            board,
            describe,
            interval_ms=config.heartbeat_ms,
            ttl_ms=config.registration_ttl_ms,
            on_replaced=stop.set,
        )
        heartbeat.start()
        await gentle_start.over()
        await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
    await _drain(config, core, heartbeat)
    http.end()
    await grpc_server.stop(0)
    for task in (stopping, following):
        task.cancel()
    await asyncio.gather(serving, stopping, following, return_exceptions=True)
    if heartbeat is not None:
        await heartbeat.stop()


async def _drain(config: GatewayConfig, core: Core, heartbeat: Heartbeat | None) -> None:
    core.drain()
    if heartbeat is not None:
        heartbeat.announce()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(config.drain_grace_ms / 1000):
            await core.idle()
    log.info("drained")


def rest_server(config: GatewayConfig, core: Core, telemetry_: Telemetry) -> tuple["RestServer", int]:
    """The REST server, listening but not yet serving, and its port. Raises OSError if the port is taken."""
    rest = Rest(
        core,
        telemetry_,
        keys=ApiKeys(config.api_key),
        timeout_ms=config.request_timeout_ms,
        max_body_bytes=config.max_body_bytes,
    )
    listener = listen(config.host, config.http_port)
    settings = uvicorn.Config(
        for_browsers(rest, config.allow_origin),
        loop="none",
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    return RestServer(settings, listener), int(listener.getsockname()[1])


def for_browsers(rest: Rest, origins: Sequence[str]) -> ASGIApp:
    """Let pages of these sites call the server from a browser; a request from elsewhere passes through untouched, and
    so does each chunk of its answer."""
    if not origins:
        return rest
    pages = CORSMiddleware(
        rest,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=(REQUEST_ID,),
    )

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        is_of_a_page = any(name == b"origin" for name, _ in scope["headers"])
        await (pages if is_of_a_page else rest)(scope, receive, send)

    return serve


class RestServer(uvicorn.Server):
    """uvicorn on a socket that is already bound, leaving signals to this process."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self._listener, self._ended = listener, asyncio.Event()

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until `end` is called."""
        await super().serve(sockets or [self._listener])

    def end(self) -> None:
        """Take no more requests, and let `serve` return."""
        self.should_exit = True
        self._ended.set()

    async def main_loop(self) -> None:
        """uvicorn looks ten times a second whether it is to end. This one is told, and wakes for the Date header."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DATE_S):
                    await self._ended.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the process's."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections send at once: small chunks must not wait for acknowledgements."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def text_paths(entries: list[str]) -> dict[str, Path]:
    """Directories by model name, from NAME=PATH or PATH. Raises InvalidRequest for one that is no directory."""
    named = [entry.split("=", 1) if "=" in entry else (Path(entry).name, entry) for entry in entries]
    paths = {name: Path(path).expanduser() for name, path in named}
    for path in paths.values():
        if not path.is_dir():
            raise InvalidRequest(f"--tokenizer: {path} is not a directory")
    return paths
