"""The main program of a worker: from configuration to a registered, serving process, and back."""

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import NoReturn

from protos.forebay.v1 import kv_pb2_grpc
from shared import gentle_start, rpc, telemetry
from shared.blackboard.board import Blackboard
from shared.blackboard.heartbeat import Heartbeat, await_epoch
from shared.blackboard.records import ModelCard, Pages, Registration, Role, Room
from shared.engine.loop import EngineLoop
from shared.engine.transfer.pools import Member, Pools, own_pool
from shared.engine.transfer.registry import transport
from shared.errors import Fault
from shared.local_sockets import LocalSockets
from shared.telemetry import Telemetry
from shared.worker.admission import Admission
from shared.worker.assembly import Assembled, assemble
from shared.worker.config import WorkerConfig
from shared.worker.identity import Identity
from shared.worker.index_writer import IndexWriter
from shared.worker.kv_servicer import KvServicer
from shared.worker.measures import Measures
from shared.worker.puller import Puller
from shared.worker.rank_process import RankProcess
from shared.worker.room_writer import RoomWriter, in_use
from shared.worker.worker import Worker

log = logging.getLogger(__name__)

# A service's name, and what adds its servicer to a server.
Services = dict[str, Callable[[Worker, rpc.Server], None]]
CLOSE_GRACE_S = 1.0
# For ending what a process that failed has open.
LEAVE_S = 10.0
# Whoever goes on with a sequence needs to be found, and to lease the pages of what was computed here.
HANDOVER_S = 1.0
# Enough that the engine does not wait for routers, and so little that the shared queue decides who is next.
STEPS_QUEUED = 16


async def serve(role: Role, config: WorkerConfig, services: Services, forked: Sequence[RankProcess] = ()) -> int:
    """Run a worker, whose other ranks may have been `forked` of this process while nothing ran in it, until SIGTERM or
    SIGINT; return the exit status. Raises a Fault if it cannot be set up."""
    name = config.name or f"{role}-{socket.gethostname()}-{os.getpid()}"
    stop = _stop_signal()
    async with AsyncExitStack() as stack:
        measured, metrics_port = telemetry.start(role, name, config)
        stack.callback(measured.close)
        assembled = await asyncio.to_thread(
            assemble, config, generates=role is not Role.PREFILL, is_wanted=lambda: not stop.is_set(), forked=forked
        )
        for rank in assembled.ranks:
            stack.callback(rank.close)
        board = Blackboard(config.redis_url)
        stack.push_async_callback(board.close)
        epoch = await await_epoch(board, name, config.heartbeat_ms, stop)
        if epoch is None:
            return 0
        identity = Identity(name, epoch, assembled.engine.spec.model)
        process = _Process(role, config, identity, assembled, measured, stop)
        await process.start(stack, board, services, metrics_port)
        gc.freeze()  # what start-up made is there to stay: to look through it at a full collection takes 0.1 s
        log.info("%s serves %s at %s", name, identity.model, process.address)
        await gentle_start.over()
        await stop.wait()
        await process.drain()
    if process.status or assembled.ranks:
        _leave(process.status)  # CUDA would wait for its kernels, and they for a rank that does not come
    return 0


class _Process:
    """The parts of a running worker."""

    def __init__(
        self,
        role: Role,
        config: WorkerConfig,
        identity: Identity,
        assembled: Assembled,
        measured: Telemetry,
        stop: asyncio.Event,
    ) -> None:
        self.status = 0
        self.address = ""
        self._role, self._config, self._identity, self._assembled = role, config, identity, assembled
        self._telemetry, self._stop = measured, stop
        self._admission, self._local = Admission(), LocalSockets(config.local_sockets)
        self._metrics_address = ""
        self._num_beats = 0

    async def start(self, stack: AsyncExitStack, board: Blackboard, services: Services, metrics_port: int) -> None:
        """Listen, register, and stay registered; `stack` undoes it in reverse order."""
        config, engine = self._config, self._assembled.engine
        loop = self._loop = EngineLoop(engine, self._on_death, config.step_timeout_ms / 1000)
        loop.start()
        stack.push_async_callback(loop.stop)
        pools = await self._pools(stack)
        self.server = rpc.Server(self._telemetry, [*services, "forebay.v1.KvService"], self._local)
        stack.push_async_callback(self.server.stop, CLOSE_GRACE_S)
        worker = self._worker(stack, loop, pools)
        kv_pb2_grpc.add_KvServiceServicer_to_server(worker.kv_servicer, self.server.grpc)
        for add in services.values():
            add(worker, self.server)
        self.address = f"{config.host}:{await self.server.start(config.host, config.port)}"
        self._metrics_address = f"{config.host}:{metrics_port}"
        await self._register(stack, board)

    async def _pools(self, stack: AsyncExitStack) -> Pools:
        """The pool of every rank, ready to be read and to be read into."""
        assembled, agent, kind = (
            self._assembled,
            f"{self._identity.name}-{self._identity.epoch}",
            self._config.transport,
        )
        own = transport(kind, assembled.engine.memory, agent)
        stack.callback(own.close)
        members = [Member(own, own_pool(own, assembled.engine.memory, assembled.layout))]
        for rank in assembled.ranks:
            members.append(await rank.attach(kind, f"{agent}-{rank.rank}", self._on_death))
            stack.callback(members[-1].transport.close)
        return Pools(members)

    def _worker(self, stack: AsyncExitStack, loop: EngineLoop, pools: Pools) -> Worker:
        engine, channels = self._assembled.engine, rpc.Channels(local=self._local)
        stack.push_async_callback(channels.close)
        measures = self._measures = Measures(self._telemetry.meter, engine)
        puller = Puller(channels, pools, engine, measures)
        stack.callback(puller.close)
        kv_servicer = KvServicer(self._identity, engine, pools, checksums=self._config.checksums)
        return Worker(self._identity, self._admission, engine, loop, kv_servicer, puller, channels, measures)

    async def _register(self, stack: AsyncExitStack, board: Blackboard) -> None:
        config, identity, kv = self._config, self._identity, self._assembled.engine.kv
        ttl_ms = config.registration_ttl_ms
        index = IndexWriter(board, kv, identity.name, identity.epoch, config.index_interval_ms, ttl_ms)
        self.heartbeat = Heartbeat(
            board,
            self._registration,
            interval_ms=config.heartbeat_ms,
            ttl_ms=ttl_ms,
            on_replaced=self._on_replaced,
            on_index_lost=index.replace,
        )
        self.heartbeat.start()
        stack.push_async_callback(self.heartbeat.stop)
        index.start()
        stack.push_async_callback(index.stop)
        room = RoomWriter(board.admission, self._admission, kv, identity, self._limits(), config.heartbeat_ms, ttl_ms)
        room.start()
        stack.push_async_callback(room.stop)
        self._loop.on_pages_freed = room.freed

    def _limits(self) -> Room:
        """What routers may send here at once."""
        config, kv = self._config, self._assembled.engine.kv
        return Room(
            sequences=config.max_num_sequences + config.max_waiting,
            tokens=config.max_queued_tokens or STEPS_QUEUED * config.max_step_tokens,
            pages=kv.num_pages,
        )

    async def drain(self) -> None:
        """Take no more work, say so, and let what is running finish. What still runs after the grace is handed over: it
        ends with Draining, upon which its gateway goes on with another worker, which pulls the pages from here."""
        self._admission.draining = True
        self.heartbeat.announce()
        await self.server.set_serving(False)
        grace_s = self._config.drain_grace_ms / 1000
        log.info("draining %d requests for at most %.0f s", self._admission.num_active, grace_s)
        if not await self._admission.drained(grace_s):
            log.warning("%d requests are handed over at the end of the grace time", self._admission.num_active)
            await self._loop.stop()
            await asyncio.sleep(0 if self.status else HANDOVER_S)
        await self._leases_end(grace_s)

    async def _leases_end(self, grace_s: float) -> None:
        """Peers may still be reading what they were promised."""
        end = asyncio.get_running_loop().time() + grace_s
        while (left := self._assembled.engine.kv.next_lease_end_s()) is not None:
            if asyncio.get_running_loop().time() + min(left, 0.05) > end:
                return
            await asyncio.sleep(min(left, 0.05))

    def _registration(self) -> Registration:
        engine, spec = self._assembled.engine, self._assembled.engine.spec
        layout, counts = spec.layout, engine.kv.counts()
        self._num_beats += 1
        return Registration(
            role=self._role,
            name=self._identity.name,
            epoch=self._identity.epoch,
            pid=os.getpid(),
            address=self.address,
            metrics_address=self._metrics_address,
            draining=self._admission.draining,
            card=ModelCard(
                model=spec.model,
                max_model_len=spec.max_model_len,
                page_size=layout.page_size,
                vocab_size=spec.vocab_size,
                eos_token_ids=spec.eos_token_ids,
                compatibility_hash=spec.compatibility_hash,
                kv_bytes_per_token=layout.page_bytes // layout.page_size,
                model_path=self._assembled.model_path,
            ),
            rank_pids=tuple(rank.pid for rank in self._assembled.ranks),
            num_beats=self._num_beats,
            load=self._measures.load(self._admission.num_active, self._admission.num_requests),
            pages=Pages(**{name: getattr(counts, name) for name in Pages.model_fields}),
            limits=self._limits(),
            used=in_use(self._admission, engine.kv),
        )

    def _on_death(self, fault: Fault) -> None:
        log.error("the engine died: %s", fault.message)
        self._end(1)

    def _on_replaced(self) -> None:
        self._end(1)

    def _end(self, status: int) -> None:
        """End the process: it cannot go on, and a new one can. What hangs holds it up for a while only."""
        self.status = status
        leaving = threading.Timer(LEAVE_S, _leave, [status])
        leaving.daemon = True
        leaving.start()
        self._config = self._config.model_copy(update={"drain_grace_ms": 0})
        self._stop.set()


def _leave(status: int) -> NoReturn:
    logging.shutdown()
    os._exit(status)


def _stop_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop
