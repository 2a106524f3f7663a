"""Prefill and decode workers in one process: real servers on loopback, the sim engine, pages moved by memmove."""

import asyncio
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
    prefill_pb2_grpc,
)
from services.decode.servicer import DecodeServicer
from services.prefill.servicer import PrefillServicer
from shared import rpc
from shared.engine.engine import Engine
from shared.engine.kv.pages import PageCounts
from shared.engine.kv.store import KvStore
from shared.engine.loop import EngineLoop
from shared.engine.sim import SimExecutor, SimModel
from shared.engine.transfer.local import LocalTransport
from shared.telemetry import Telemetry
from shared.worker.identity import Admission, Identity
from shared.worker.kv_servicer import KvServicer
from shared.worker.measures import Measures
from shared.worker.puller import Puller
from shared.worker.worker import Worker

MODEL = SimModel(page_size=4, prefill_ms_per_token=0.05, decode_ms=1.0)
SERVICES = ("forebay.v1.PrefillService", "forebay.v1.DecodeService", "forebay.v1.KvService")


@dataclass
class Running:
    """A worker that serves both roles, and all there is to know of it."""

    worker: Worker
    server: rpc.Server
    transport: LocalTransport
    ref: kv_pb2.WorkerRef

    @property
    def counts(self) -> PageCounts:
        return self.worker.engine.kv.counts()

    async def comes_true(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition; fails, with the pages, if it does not come true."""
        end = time.monotonic() + 5
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
        self, name: str, *, epoch: int = 1, num_pages: int = 256, lease_ttl_ms: int = 10_000, model: SimModel = MODEL
    ) -> Running:
        """A worker called `name`."""
        executor = SimExecutor(model, num_pages)
        kv = KvStore(num_pages, model.page_size, lease_ttl_ms)
        engine = Engine(executor, kv, max_step_tokens=32, max_num_sequences=16)
        loop = EngineLoop(engine)
        loop.start()
        identity = Identity(name, epoch, engine.spec.model)
        transport = LocalTransport(engine.memory, f"{name}-{epoch}", self.hub)
        measures, channels = Measures(self.telemetry.meter, engine), rpc.Channels()
        kv_servicer = KvServicer(identity, engine, transport)
        puller = Puller(channels, transport, engine.spec, measures)
        worker = Worker(identity, Admission(), engine, loop, kv_servicer, puller, channels, measures)
        server = rpc.Server(self.telemetry, SERVICES)
        kv_pb2_grpc.add_KvServiceServicer_to_server(kv_servicer, server.grpc)
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(PrefillServicer(worker), server.grpc)
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(DecodeServicer(worker), server.grpc)
        address = f"127.0.0.1:{await server.start('127.0.0.1', 0)}"
        ref = kv_pb2.WorkerRef(worker_id=name, epoch=epoch, address=address)
        self.running.append(Running(worker, server, transport, ref))
        return self.running[-1]

    async def stop(self, running: Running) -> None:
        """Kill a worker: its server, its engine and its pages are gone."""
        self.running.remove(running)
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

    def stub(self, running: Running) -> Any:
        return decode_pb2_grpc.DecodeServiceStub(self.channels.to(running.ref.address))


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

    @property
    def usage(self) -> generation_pb2.Usage:
        assert self.finished is not None
        return self.finished.usage


def request(
    prompt: Sequence[int],
    decode: Running,
    prefill: Running | None = None,
    source: Running | None = None,
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
        hash_key=b"tenant",
    )
    made.placement.decode.CopyFrom(decode.ref)
    if prefill is not None:
        made.placement.prefill.CopyFrom(prefill.ref)
    if source is not None:
        made.placement.kv_source.CopyFrom(source.ref)
    return made


async def generate(fleet: Fleet, message: decode_pb2.GenerateRequest, running: Running) -> Answer:
    """Send a request to a decode worker and collect what it answers."""
    answer = Answer()
    async with aclosing(rpc.stream(fleet.stub(running).Generate, message, 20.0)) as responses:
        async for response in responses:
            assert answer.finished is None, "something followed the terminal event"
            if response.HasField("tokens"):
                answer.tokens.extend(response.tokens.token_ids)
            else:
                answer.finished = response.finished
    return answer
