"""Prefill and decode workers in one process: real servers on loopback, the sim engine, pages moved by memmove."""

import asyncio
import ctypes
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from protos.forebay.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    generation_pb2,
    kv_pb2,
    kv_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
)
from services.decode.servicer import DecodeServicer
from services.prefill.servicer import PrefillServicer
from shared import rpc
from shared.engine.engine import Engine
from shared.engine.kv.memory import HostMemory
from shared.engine.kv.pages import PageCounts
from shared.engine.kv.store import KvStore
from shared.engine.loop import EngineLoop
from shared.engine.sim import SimExecutor, SimModel
from shared.engine.speculation.speculator import Speculation
from shared.engine.transfer.local import LocalPeer, LocalTransport
from shared.engine.transfer.pools import Member, Pools, own_pool
from shared.telemetry import Telemetry
from shared.worker.admission import Admission
from shared.worker.identity import Identity
from shared.worker.kv_servicer import KvServicer
from shared.worker.measures import Measures
from shared.worker.puller import Puller
from shared.worker.worker import Worker

MODEL = SimModel(page_size=4, prefill_ms_per_token=0.05, decode_ms=1.0)
PATIENCE_S = 10.0
LEASE_TTL_MS = 60_000  # longer than PATIENCE_S: what waits for pages must not be saved by a lease that lapses
MAX_STEP_TOKENS = 32
KEY = b"tenant"
SERVICES = ("forebay.v1.PrefillService", "forebay.v1.DecodeService", "forebay.v1.KvService")


Tamper = Callable[[prefill_pb2.PrefillResponse], prefill_pb2.PrefillResponse | None]


class Gate:
    """An engine's `sleep`. Closed, it holds each step after its bytes are written and before its events are sent."""

    def __init__(self) -> None:
        self._closed = False
        self._passes = threading.Semaphore(0)
        self.holding = threading.Event()

    def close(self) -> None:
        self._closed = True

    def open(self) -> None:
        self._closed = False
        self.let_through()

    def let_through(self) -> None:
        """Let the step at hand go."""
        if self.holding.is_set():
            self.holding.clear()
            self._passes.release()

    def __call__(self, seconds: float) -> None:
        time.sleep(seconds)
        if self._closed:
            self.holding.set()
            # Longer than anybody waits for it: a step that let itself through would look like one that was never held.
            self._passes.acquire(timeout=6 * PATIENCE_S)


@dataclass
class Clock:
    """The time that leases live by: it can be put forward."""

    ahead_s: float = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


class TamperedPrefill(PrefillServicer):
    """A prefill worker that says what `tamper` makes of the truth; None says nothing."""

    tamper: Tamper = staticmethod(lambda response: response)

    async def Prefill(self, request: Any, context: Any) -> AsyncGenerator[prefill_pb2.PrefillResponse, None]:
        async with aclosing(super().Prefill(request, context)) as responses:
            async for response in responses:
                if (told := self.tamper(response)) is not None:
                    yield told


class TamperedKv(KvServicer):
    """A peer that answers what `tamper` makes of the truth."""

    tamper_connect: Callable[[kv_pb2.ConnectResponse], None] = staticmethod(lambda answer: None)
    tamper_acquire: Callable[[kv_pb2.AcquireResponse], None] = staticmethod(lambda answer: None)
    is_silent = False

    async def Connect(self, request: kv_pb2.ConnectRequest, context: Any) -> kv_pb2.ConnectResponse:
        answer = await super().Connect(request, context)
        self.tamper_connect(answer)
        return answer

    async def Acquire(self, request: kv_pb2.AcquireRequest, context: Any) -> kv_pb2.AcquireResponse:
        if self.is_silent:
            await asyncio.Event().wait()
        answer = await super().Acquire(request, context)
        self.tamper_acquire(answer)
        return answer


class Wire(LocalTransport):
    """Moves pages, then does `arrived` to our pages that it wrote; `served` is told when its owner is to serve."""

    arrived: Callable[[Sequence[int]], None] = staticmethod(lambda page_ids: None)
    served: Callable[[float], None] = staticmethod(lambda seconds: None)

    def serve(self, seconds: float) -> None:
        super().serve(seconds)
        self.served(seconds)

    async def _copy(self, peer: LocalPeer, remote: Sequence[int], local: Sequence[int]) -> None:
        await super()._copy(peer, remote, local)
        self.arrived(local)


@dataclass
class Running:
    """A worker that serves both roles, and all there is to know of it."""

    worker: Worker
    server: rpc.Server
    transport: "Wire"
    prefill: TamperedPrefill
    peer: TamperedKv
    ref: kv_pb2.WorkerRef
    gate: Gate
    clock: Clock

    @property
    def kv(self) -> KvStore:
        return self.worker.engine.kv

    @property
    def pages(self) -> list[bytes]:
        """The bytes of every page of the pool."""
        memory = self.worker.engine.memory
        assert isinstance(memory, HostMemory)
        return [bytes(memory.page(page_id)) for page_id in range(memory.num_pages)]

    def spoil(self, page_ids: Sequence[int]) -> None:
        """Turn one bit of the last byte of each page: of the last state class, behind all others."""
        memory = self.worker.engine.memory
        for page_id in page_ids:
            memory.page(page_id)[-1] ^= 1

    def overwrite(self) -> None:
        """Fill the pool with nonsense, as if every page had become somebody else's."""
        memory = self.worker.engine.memory
        ctypes.memset(memory.address, 66, memory.num_bytes)

    @property
    def num_steps(self) -> int:
        return self.worker.engine.load().num_steps

    async def held_up(self) -> None:
        """Wait until the closed gate holds a step."""
        await self.comes_true(self.gate.holding.is_set)

    @property
    def counts(self) -> PageCounts:
        return self.worker.engine.kv.counts()

    async def comes_true(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; fails, with the pages, if it does not come true."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < end, self.counts
            await asyncio.sleep(0.005)

    async def idle(self) -> PageCounts:
        """Its pages once nobody holds or leases any; fails if that does not come true."""
        await self.comes_true(lambda: not (self.counts.held or self.counts.leased))
        counts = self.counts
        faults = self.worker.engine.kv.check()
        assert not faults, faults
        assert counts.free + counts.cached == counts.total
        return counts


@dataclass
class Fleet:
    """Workers that can reach each other, and a client."""

    channels: rpc.Channels = field(default_factory=rpc.Channels)
    telemetry: Telemetry = field(default_factory=lambda: Telemetry("test", "test"))
    hub: dict[str, LocalTransport] = field(default_factory=dict)
    running: list[Running] = field(default_factory=list)

    async def start(
        self,
        name: str,
        *,
        epoch: int = 1,
        num_pages: int = 256,
        lease_ttl_ms: int = LEASE_TTL_MS,
        model: SimModel = MODEL,
        checksums: bool = False,
        speculation: Speculation | None = None,
        connect_ms: float = 0.0,
        patience_ms: float = PATIENCE_S * 1000,
        is_alone: bool = False,
    ) -> Running:
        """A worker called `name`. It waits for its pools' connections to peers, unless told that they take long, and
        for peers that have a prefix, on a busy machine for more than a worker's least patience. It has a connection
        for calls to each worker that runs, unless it `is_alone`."""
        gate, clock = Gate(), Clock()
        # A clock that stands still: a step of which the computation alone took its time would not sleep, nor be held.
        executor = SimExecutor(model, num_pages, sleep=gate, clock=lambda: 0.0)
        kv = KvStore(num_pages, model.page_size, lease_ttl_ms, clock)
        engine = Engine(executor, kv, max_step_tokens=MAX_STEP_TOKENS, max_num_sequences=16, speculation=speculation)
        loop = EngineLoop(engine)
        loop.start()
        identity = Identity(name, epoch, engine.spec.model)
        transport = Wire(engine.memory, f"{name}-{epoch}", self.hub)
        measures, channels = Measures(self.telemetry.meter, engine), rpc.Channels()
        pools = Pools([Member(transport, own_pool(transport, engine.memory, engine.spec.layout))])
        kv_servicer = TamperedKv(identity, engine, pools, checksums=checksums)
        puller = Puller(channels, pools, engine, measures, connect_ms, 0.01, patience_ms)
        worker = Worker(identity, Admission(), engine, loop, kv_servicer, puller, channels, measures)
        server = rpc.Server(self.telemetry, SERVICES)
        kv_pb2_grpc.add_KvServiceServicer_to_server(kv_servicer, server.grpc)
        prefill = TamperedPrefill(worker)
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, server.grpc)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(worker), server.grpc)
        address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
        ref = kv_pb2.WorkerRef(worker_id=name, epoch=epoch, address=address)
        made = Running(worker, server, transport, prefill, kv_servicer, ref, gate, clock)
        others = [] if is_alone else list(self.running)
        self.running.append(made)
        await self._connect(made, others)
        return made

    async def _connect(self, made: Running, others: Sequence[Running]) -> None:
        """Connect a new worker with the client and with others. A connection that takes a tenth of a second counts as
        refused (`shared/rpc.py`); on a busy machine it does, and other than a gateway a test cannot go elsewhere."""
        ways = [(self.channels, made)]
        for other in others:
            ways += [(other.worker.channels, made), (made.worker.channels, other)]
        async with asyncio.timeout(PATIENCE_S):
            for channels, callee in ways:
                await channels.to(callee.ref.address).channel_ready()

    async def stop(self, running: Running) -> None:
        """Kill a worker: its server, its engine and its pages are gone."""
        self.running.remove(running)
        running.gate.open()
        running.transport.answer(True)
        await running.server.stop(0)
        await running.worker.channels.close()
        running.worker.puller.close()
        await running.worker.loop.stop()
        running.transport.close()

    async def close(self) -> None:
        await self.channels.close()
        for running in list(self.running):
            await self.stop(running)
        self.telemetry.close()

    def measured(self, metric: str, **labels: str) -> float:
        """A number that the workers measure together."""
        return self.telemetry.registry.get_sample_value(metric, labels) or 0.0

    async def expected(self, message: decode_pb2.GenerateRequest) -> list[int]:
        """What is generated for a request by a worker alone."""
        return (await answered_alone(self, message)).tokens


@asynccontextmanager
async def fleet() -> AsyncGenerator[Fleet, None]:
    made = Fleet()
    try:
        yield made
    finally:
        await made.close()


@dataclass
class Answer:
    """What a client got."""

    tokens: list[int] = field(default_factory=list)
    finished: decode_pb2.GenerateFinished | None = None
    told: list[generation_pb2.TokenLogprobs] = field(default_factory=list)

    @property
    def usage(self) -> generation_pb2.Usage:
        assert self.finished is not None
        return self.finished.usage


def prompt(num_tokens: int, first: int = 100) -> range:
    """Tokens for a prompt; another `first` makes another prompt."""
    return range(first, first + num_tokens)


def request(
    prompt: Sequence[int],
    decode: Running,
    prefill: Running | None = None,
    source: Running | None = None,
    second: Running | None = None,
    **sampling: Any,
) -> decode_pb2.GenerateRequest:
    """A request for 12 greedy tokens unless told otherwise."""
    defaults: dict[str, Any] = {
        "top_p": 1.0,
        "repetition_penalty": 1.0,
        "max_tokens": 12,
        "ignore_eos": True,
    }
    made = decode_pb2.GenerateRequest(
        request_id="r",
        model=MODEL.name,
        prompt_token_ids=prompt,
        sampling=generation_pb2.SamplingParams(**(defaults | sampling)),
        hash_key=KEY,
    )
    made.placement.decode.CopyFrom(decode.ref)
    if prefill is not None:
        made.placement.prefill.CopyFrom(prefill.ref)
    if second is not None:
        made.placement.second_prefill.CopyFrom(second.ref)
    if source is not None:
        made.placement.kv_source.CopyFrom(source.ref)
    return made


def stream(fleet: Fleet, message: decode_pb2.GenerateRequest, timeout_s: float = 2 * PATIENCE_S) -> Any:
    """The responses to a request, from the decode worker that it names."""
    stub: Any = decode_pb2_grpc.DecodeServiceStub(fleet.channels.to(message.placement.decode.address))
    return rpc.stream(stub.Generate, message, timeout_s)


async def generate(fleet: Fleet, message: decode_pb2.GenerateRequest, timeout_s: float = 2 * PATIENCE_S) -> Answer:
    """Send a request to the decode worker that it names and collect what it answers."""
    answer = Answer()
    async with aclosing(stream(fleet, message, timeout_s)) as responses:
        async for response in responses:
            assert answer.finished is None, "something followed the terminal event"
            if response.HasField("tokens"):
                answer.tokens.extend(response.tokens.token_ids)
            elif response.HasField("prompt_logprobs"):
                assert not answer.tokens, "the prompt is told of before what follows it"
                answer.told.extend(response.prompt_logprobs.logprobs)
            else:
                answer.finished = response.finished
    return answer


async def answered_alone(fleet: Fleet, message: decode_pb2.GenerateRequest) -> Answer:
    """What a worker says that knows nothing yet, and asks nobody."""
    alone = await fleet.start("alone", is_alone=True)
    copy = decode_pb2.GenerateRequest()
    copy.CopyFrom(message)
    copy.placement.CopyFrom(decode_pb2.Placement(decode=alone.ref))
    answer = await generate(fleet, copy)
    await fleet.stop(alone)
    return answer
