"""`python -m services.router`: register, serve, and drain on SIGTERM."""

import asyncio
import gc
import logging
import os
import signal
import socket
from functools import partial

from protos.forebay.v1 import router_pb2, router_pb2_grpc
from services.router.admission import Admission
from services.router.config import RouterConfig
from services.router.doubts import Doubts
from services.router.fleet import Fleet
from services.router.mirror import Mirror
from services.router.mirror_feed import MirrorFeed
from services.router.placements import Placements
from services.router.servicer import RouterServicer
from shared import entry, gentle_start, rpc, telemetry
from shared.blackboard.board import Blackboard
from shared.blackboard.heartbeat import Heartbeat, await_epoch
from shared.blackboard.records import Registration, Role
from shared.local_sockets import LocalSockets
from shared.telemetry import Telemetry

log = logging.getLogger(__name__)

# Objects that are made, less those that are gone, between two searches for garbage: some hundred requests.
GC_ALLOCATIONS = 10_000
SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name


async def main(config: RouterConfig) -> None:
    """Run a router until SIGTERM or SIGINT."""
    name = config.name or f"router-{socket.gethostname()}"
    ended = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, ended.set)
    observed, metrics_port = telemetry.start("router", name, config)
    board = Blackboard(config.redis_url)
    try:
        await serve(config, name, board, observed, metrics_port, ended)
    finally:
        await board.close()
        observed.close()


async def serve(
    config: RouterConfig, name: str, board: Blackboard, observed: Telemetry, metrics_port: int, ended: asyncio.Event
) -> None:
    """Serve until `ended`, then drain: leave the blackboard first, so that nobody comes, then finish what runs."""
    weights, mirror = config.weights(), Mirror(config.index_max_pages)
    fleet = Fleet(board, weights, heartbeat_ms=config.heartbeat_ms, ttl_ms=config.registration_ttl_ms)
    feed = MirrorFeed(board.index, fleet, mirror)
    server = rpc.Server(observed, [SERVICE], LocalSockets(config.local_sockets))
    admission = Admission(board.admission, name, config.limits(), observed.meter)
    placements, doubts = Placements(fleet, board.placements, name), Doubts(fleet)
    servicer = RouterServicer(fleet, mirror, placements, doubts, admission, weights, observed, config.no_worker_wait_ms)
    router_pb2_grpc.add_RouterServiceServicer_to_server(servicer, server.grpc)
    works = (fleet.run(), feed.run(), placements.run(), doubts.run(), admission.run())
    watching = [asyncio.create_task(work) for work in works]
    for task in watching:
        task.add_done_callback(partial(_over, ended))
    port = await server.start(config.host, config.port, serving=False)
    if (epoch := await _epoch(config, name, board, feed, ended)) is not None:
        steady()
        await server.set_serving(True)
        log.info("serving at %s:%d", config.host, port)
        heartbeat = _register(config, name, epoch, board, port, metrics_port, ended)
        await gentle_start.over()
        await ended.wait()
        await heartbeat.stop()
    admission.drain()
    await server.stop(config.drain_grace_ms / 1000)
    log.info("drained")
    await admission.settled()
    for task in watching:
        task.cancel()
    for found in await asyncio.gather(*watching, return_exceptions=True):
        if isinstance(found, Exception):
            raise found


def _over(ended: asyncio.Event, task: asyncio.Task[None]) -> None:
    """A defect in what watches must not leave a router that sees nothing: it ends, and says why."""
    if not task.cancelled() and (error := task.exception()):
        log.critical("this router ends: what watches the blackboard failed", exc_info=error)
    ended.set()


def steady() -> None:
    """From now on look for garbage among what requests leave, and seldom: what is there at the start stays, and going
    through all of it would hold a request up for longer than deciding on it takes."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, 50, 100)


async def _epoch(
    config: RouterConfig, name: str, board: Blackboard, feed: MirrorFeed, ended: asyncio.Event
) -> int | None:
    """This router's epoch, once it has a mirror of the prefix index; None if it is to end before."""
    if (epoch := await await_epoch(board, name, config.heartbeat_ms, ended)) is None:
        return None
    waits = [asyncio.create_task(feed.ready.wait()), asyncio.create_task(ended.wait())]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for task in waits:
        task.cancel()
    return epoch if feed.ready.is_set() else None


def _register(
    config: RouterConfig,
    name: str,
    epoch: int,
    board: Blackboard,
    port: int,
    metrics_port: int,
    ended: asyncio.Event,
) -> Heartbeat:
    registration = Registration(
        role=Role.ROUTER,
        name=name,
        epoch=epoch,
        pid=os.getpid(),
        address=f"{config.host}:{port}",
        metrics_address=f"{config.host}:{metrics_port}",
    )
    heartbeat = Heartbeat(
        board,
        lambda: registration,
        interval_ms=config.heartbeat_ms,
        ttl_ms=config.registration_ttl_ms,
        on_replaced=ended.set,
    )
    heartbeat.start()
    return heartbeat


if __name__ == "__main__":
    entry.run(main(RouterConfig.load()))
