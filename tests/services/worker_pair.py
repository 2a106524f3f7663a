"""A prefill and a decode worker, or one of them, in processes of their own as they are deployed, and their client."""

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from protos.forebay.v1 import decode_pb2, decode_pb2_grpc, generation_pb2, kv_pb2
from shared import rpc
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Registration, Role
from shared.forking import Child
from tests import nursery
from tests.services.workers import KEY, prompt
from tests.valkey import ValkeyProcess

PATIENCE_S = 30.0
FLAGS = ["--engine", "sim", "--kv-cache-mb", "16", "--max-step-tokens", "128", "--sim-decode-ms", "2"]


class Pair:
    """A prefill and a decode worker, each a process of its own, and what Redis knows of them."""

    def __init__(self, valkey: ValkeyProcess, flags: Sequence[str] = FLAGS, model: str = "sim") -> None:
        self.valkey, self.flags, self.model = valkey, flags, model
        self.board = Blackboard(valkey.url)
        self.channels = rpc.Channels()
        self.processes: dict[str, Child] = {}
        self.found: dict[str, Registration] = {}

    def launch(self, name: str, *flags: str, executed: bool = False) -> None:
        """Start one; if it is not to be executed, it has nothing left to import."""
        command = [sys.executable, "-m", f"services.{name}", "--name", name, "--redis-url", self.valkey.url]
        command += [*self.flags, *flags]
        if executed:
            self.processes[name] = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            return
        with Path(os.devnull).open("wb") as nothing:
            self.processes[name] = nursery.start("sim" if self.model == "sim" else "torch", command, nothing)

    async def registered(self, patience_s: float = PATIENCE_S) -> None:
        """Wait until those that were launched are registered by their present processes."""

        async def all_are() -> bool:
            listed = await self.board.processes(Role.PREFILL, Role.DECODE)
            self.found = {each.name: each for each in listed if each.pid == self.processes[each.name].pid}
            return self.found.keys() == self.processes.keys()

        await comes_true(all_are, patience_s)

    def request(self, num_tokens: int, max_tokens: int = 8, first: int = 100) -> decode_pb2.GenerateRequest:
        """A prompt for the prefill worker, if there is one, to be continued on the decode worker."""
        refs = {
            name: kv_pb2.WorkerRef(worker_id=name, epoch=each.epoch, address=each.address)
            for name, each in self.found.items()
        }
        sampling = generation_pb2.SamplingParams(max_tokens=max_tokens, top_p=1, repetition_penalty=1, ignore_eos=True)
        return decode_pb2.GenerateRequest(
            request_id="r",
            model=self.model,
            prompt_token_ids=prompt(num_tokens, first),
            sampling=sampling,
            hash_key=KEY,
            placement=decode_pb2.Placement(decode=refs["decode"], prefill=refs.get("prefill")),
        )

    async def generate(self, message: decode_pb2.GenerateRequest, started: asyncio.Event | None = None) -> list[int]:
        """The tokens of a request; `started` is set with the first ones."""
        stub: Any = decode_pb2_grpc.DecodeServiceStub(self.channels.to(message.placement.decode.address))
        tokens: list[int] = []
        async with aclosing(rpc.stream(stub.Generate, message, PATIENCE_S)) as responses:
            async for response in responses:
                tokens += response.tokens.token_ids
                if started is not None:
                    started.set()
        return tokens

    async def aggregated(self, message: decode_pb2.GenerateRequest) -> list[int]:
        """The tokens of the same request computed on the decode worker, under another tenant, so without its cache."""
        copy = decode_pb2.GenerateRequest()
        copy.CopyFrom(message)
        copy.hash_key = b"another tenant"
        copy.placement.ClearField("prefill")
        return await self.generate(copy)

    def measure(self, name: str, measure: str) -> float:
        """A number from a worker's metrics; the sum if there are several."""
        with urllib.request.urlopen(f"http://{self.found[name].metrics_address}/metrics", timeout=5) as page:
            lines = page.read().decode().splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(measure))

    async def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        await self.channels.close()
        await self.board.close()


async def comes_true(condition: Callable[[], Awaitable[bool]], patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)
