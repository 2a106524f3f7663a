"""A whole gateway before a router and decode workers that do what a test tells them."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer as HfTokenizer

from protos.forebay.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    gateway_pb2_grpc,
    generation_pb2,
    kv_pb2,
    router_pb2,
    router_pb2_grpc,
)
from services.gateway.api_keys import ApiKeys
from services.gateway.config import GatewayConfig
from services.gateway.core import Core
from services.gateway.directory import Directory
from services.gateway.dispatch import Dispatcher
from services.gateway.meters import Meters
from services.gateway.process import rest_server
from services.gateway.rest import Rest
from services.gateway.servicer import SERVICE, GatewayServicer
from services.gateway.tokenizer import Tokenizer
from shared import rpc
from shared.blackboard.records import ModelCard, Registration, Role
from shared.errors import Fault, NoWorker
from shared.telemetry import Telemetry
from tests.unit.gateway.tiny_tokenizers import TEMPLATE, write_model

MODEL = "tiny"
MAX_MODEL_LEN = 200
Response = decode_pb2.GenerateResponse
Script = Callable[[decode_pb2.GenerateRequest], AsyncIterator[Response]]


def tokens(*token_ids: int, logprobs: bool = False) -> Response:
    """One step's tokens; with log-probabilities, each has itself and token 0 as alternatives."""
    found = [
        generation_pb2.TokenLogprobs(logprob=-0.5, top_token_ids=[i, 0], top_logprobs=[-0.5, -2.0]) for i in token_ids
    ]
    return Response(tokens=generation_pb2.TokenChunk(token_ids=token_ids, logprobs=found if logprobs else []))


def finished(reason: str = "STOP", stop_token_id: int | None = None, num_cached: int = 0) -> Response:
    usage = generation_pb2.Usage(num_cached_local=num_cached)
    value = generation_pb2.FinishReason.Value(f"FINISH_REASON_{reason}")
    return Response(finished=decode_pb2.GenerateFinished(reason=value, usage=usage, stop_token_id=stop_token_id))


class FakeDecode(decode_pb2_grpc.DecodeServiceServicer):
    """Answers each request by a script, and remembers requests and cancellations."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[decode_pb2.GenerateRequest] = []
        self.num_running = 0
        self.idle, self.busy = asyncio.Event(), asyncio.Event()

    async def Generate(self, request: decode_pb2.GenerateRequest, _context: Any) -> AsyncIterator[Response]:
        self.requests.append(request)
        self.num_running += 1
        self.busy.set()
        try:
            async for response in self.script(request):
                yield response
        finally:
            self.num_running -= 1
            if not self.num_running:
                self.idle.set()


class FakeRouter(router_pb2_grpc.RouterServiceServicer):
    """Places requests on the first worker that is not excluded."""

    def __init__(self) -> None:
        self.workers: list[kv_pb2.WorkerRef] = []
        self.requests: list[router_pb2.RouteRequest] = []
        self.withdrawn: list[router_pb2.WithdrawRequest] = []
        self.fault: Fault | None = None
        self.asked, self.answers = asyncio.Event(), asyncio.Event()
        self.answers.set()

    async def Route(self, request: router_pb2.RouteRequest, _context: Any) -> router_pb2.RouteResponse:
        self.requests.append(request)
        self.asked.set()
        await self.answers.wait()
        if self.fault is not None:
            raise self.fault
        for worker in self.workers:
            if worker.worker_id not in request.excluded_worker_ids:
                return router_pb2.RouteResponse(placement=decode_pb2.Placement(decode=worker))
        raise NoWorker("all decode workers are excluded")

    async def Withdraw(self, request: router_pb2.WithdrawRequest, _context: Any) -> router_pb2.WithdrawResponse:
        self.withdrawn.append(request)
        return router_pb2.WithdrawResponse()

    async def Explain(self, _request: Any, _context: Any) -> router_pb2.ExplainResponse:
        raise NoWorker("not here")


class World:
    """Tests change scripts, workers and the directory as they need."""

    def __init__(
        self,
        directory: Path,
        *,
        tokenizer: HfTokenizer | None = None,
        template: str = TEMPLATE,
        max_model_len: int = MAX_MODEL_LEN,
    ) -> None:
        self.model_path = write_model(directory, tokenizer, template)
        self._max_model_len = max_model_len
        self._vocab_size = max(300, tokenizer.get_vocab_size() if tokenizer else 0)
        self.telemetry = Telemetry("gateway", "gateway-0")
        self.channels = rpc.Channels()
        self.servers: dict[str, rpc.Server] = {}
        self.router, self.decodes = FakeRouter(), {"decode-0": FakeDecode(self.script)}
        self.directory = Directory({})
        meters = Meters(self.telemetry.meter)
        self.dispatcher = Dispatcher(self.directory, self.channels, meters, recovery_wait_ms=5_000)
        self.core = Core(self.directory, self.dispatcher, meters, max_choices=16)
        rest = Rest(self.core, self.telemetry, keys=ApiKeys([]), timeout_ms=30_000, max_body_bytes=100_000)
        self.app = rest
        transport = httpx.ASGITransport(self.app)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://gateway")
        self.steps: list[Response] = []
        self.registrations: list[Registration] = []

    @property
    def decode(self) -> FakeDecode:
        return self.decodes["decode-0"]

    @property
    def tokenizer(self) -> Tokenizer:
        tokenizer = self.directory.models[0].text.tokenizer
        assert tokenizer is not None
        return tokenizer

    async def script(self, request: decode_pb2.GenerateRequest) -> AsyncIterator[Response]:
        """The default: what `says` set."""
        for step in self.steps:
            yield step

    async def says(self, text: str, *, logprobs: bool = False, **end: Any) -> list[int]:
        """Make the model answer with a text, a token a step. Returns the token ids."""
        ids = await self.tokenizer.encode(text, special=False)
        self.steps = [*(tokens(token_id, logprobs=logprobs) for token_id in ids), finished(**end)]
        return ids

    async def start(self) -> None:
        await self.start_router()
        for name in self.decodes:
            await self.start_decode(name)
        await self.directory.update(self.registrations)
        if self.directory.models[0].text.tokenizer is not None:
            await self.says("hello world")

    async def start_router(self, name: str = "router-0", router: FakeRouter | None = None) -> None:
        server = rpc.Server(self.telemetry, [])
        router_pb2_grpc.add_RouterServiceServicer_to_server(router or self.router, server.grpc)
        self._register(Role.ROUTER, name, await server.start("127.0.0.1", 0))
        self.servers[name] = server

    async def start_decode(self, name: str) -> None:
        server = rpc.Server(self.telemetry, [])
        fake = self.decodes.setdefault(name, FakeDecode(self.script))
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(fake, server.grpc)
        port = await server.start("127.0.0.1", 0)
        self._register(Role.DECODE, name, port)
        self.router.workers.append(kv_pb2.WorkerRef(worker_id=name, epoch=1, address=f"127.0.0.1:{port}"))
        self.servers[name] = server

    async def stop(self, name: str) -> None:
        """End a fake process at once."""
        self.registrations = [r for r in self.registrations if r.name != name]
        await self.servers.pop(name).stop(0)

    async def start_grpc(self, *keys: str) -> str:
        """Serve the gateway's gRPC face, with API keys if there are any; returns its address."""
        server = rpc.Server(self.telemetry, [SERVICE], takes_lines=False)
        servicer = GatewayServicer(self.core, ApiKeys(keys), 30_000)
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(servicer, server.grpc)
        self.servers["gateway"] = server
        return f"127.0.0.1:{await server.start('127.0.0.1', 0)}"

    async def close(self) -> None:
        await self.http.aclose()
        await self.channels.close()
        for server in self.servers.values():
            await server.stop(0)
        self.telemetry.close()

    def _register(self, role: Role, name: str, port: int) -> None:
        card = ModelCard(
            model=MODEL,
            max_model_len=self._max_model_len,
            page_size=4,
            vocab_size=self._vocab_size,
            eos_token_ids=(0,),
            compatibility_hash="0123456789abcdef0123",
            model_path=str(self.model_path),
        )
        self.registrations.append(
            Registration(
                role=role,
                name=name,
                epoch=1,
                pid=1,
                address=f"127.0.0.1:{port}",
                card=card if role is Role.DECODE else None,
            )
        )


@asynccontextmanager
async def served(world: World, *flags: str) -> AsyncIterator[str]:
    """The URL of a world's REST face behind a real server, which ends whatever becomes of the test."""
    server, port = rest_server(GatewayConfig.load(["--http-port", "0", *flags]), world.core, world.telemetry)
    serving = asyncio.create_task(server.serve())
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.end()
        await serving
