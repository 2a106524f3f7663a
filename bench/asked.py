"""Who answers a benchmark's prompts: the bare engine in this process, or the four services, both timed alike."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from cli.background import Background
from shared.engine.api import EngineRequest, SamplingParams, TokensSampled
from shared.engine.loop import EngineLoop
from shared.worker.assembly import assemble
from shared.worker.config import WorkerConfig

Arrivals = list[tuple[float, int]]


@dataclass(frozen=True)
class Timing:
    """One request: milliseconds to the first token, and from token to token after it."""

    first_ms: float
    each_ms: float


class Asked(Protocol):
    """What answers prompts."""

    async def ask(self, prompt: Sequence[int], num_tokens: int) -> Timing:
        """Have `num_tokens` tokens generated, greedily."""


def timing(started_s: float, arrivals: Arrivals) -> Timing:
    """`arrivals` are times at which so many tokens came. Raises ValueError if none did."""
    if not arrivals:
        raise ValueError("a prompt was not answered")
    num_later = sum(number for _, number in arrivals[1:])
    took_s = arrivals[-1][0] - arrivals[0][0]
    return Timing((arrivals[0][0] - started_s) * 1e3, took_s * 1e3 / max(1, num_later))


class Bare:
    """The engine in this process."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    async def ask(self, prompt: Sequence[int], num_tokens: int) -> Timing:
        """See `Asked`."""
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        started_s, arrivals = time.perf_counter(), Arrivals()
        async for event in self._loop.generate(EngineRequest("bare", tuple(prompt), sampling, hash_key=b"bench")):
            if isinstance(event, TokensSampled):
                arrivals.append((time.perf_counter(), len(event.tokens)))
        return timing(started_s, arrivals)


class Cluster:
    """The four services over REST.

    HTTP is written out here: httpx adds 1.7 ms of its own to a first token and aiohttp 1.0, and neither is the path.
    """

    def __init__(self, running: Background) -> None:
        self._address, self._model = urlsplit(running.run.url), running.run.model

    async def ask(self, prompt: Sequence[int] | str, num_tokens: int) -> Timing:
        """See `Asked`; of a text, too."""
        body: dict[str, Any] = {"model": self._model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
        content = json.dumps(body | {"stream": True, "ignore_eos": True, "return_token_ids": True}).encode()
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Type: application/json\r\n"
        started_s, lines = time.perf_counter(), list[tuple[float, bytes]]()
        try:
            writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            async for line in reader:
                if line.startswith(b"data: {"):
                    lines.append((time.perf_counter(), line))
        finally:
            writer.close()
        counts = [(at, len(json.loads(line[6:])["choices"][0].get("token_ids", ()))) for at, line in lines]
        return timing(started_s, [(at, number) for at, number in counts if number])


@asynccontextmanager
async def bare_engine(flags: Sequence[str]) -> AsyncGenerator[Bare, None]:
    """An engine as a worker with these flags has it."""
    loop = EngineLoop(assemble(WorkerConfig.load(list(flags))).engine)
    loop.start()
    try:
        yield Bare(loop)
    finally:
        await loop.stop()
