"""What the four-service path costs beside the bare engine, with the default model, in one run.

    python -m bench.path [--repeats 7]

First the bare engine in this process, then a cluster of one prefill and one decode worker, over REST with streaming:
time until the cluster is healthy, time to first token of prompts of 64 (prefilled on the decode worker), 512 (handed
over) and 512 tokens whose prefix is cached, time per token at batch 1, 8 streams together, and of a handed-over prompt
of 1,500 tokens the time that reading its pages took.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from bench import provenance
from cli import background
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Role
from shared.engine.api import EngineRequest, SamplingParams, TokensSampled
from shared.engine.loop import EngineLoop
from shared.worker.assembly import assemble
from shared.worker.config import WorkerConfig

NUM_TOKENS = 64
PAUSE_S = 0.2


@dataclass(frozen=True)
class Timing:
    """One request: seconds to the first token, and from token to token after it."""

    first_s: float
    each_s: float


def prompts(length: int, count: int, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [chance.choices(range(100, 40_000), k=length) for _ in range(count)]


def best_and_median(values: Sequence[float], unit: float = 1e3) -> str:
    return f"{statistics.median(values) * unit:.1f} ms (best {min(values) * unit:.1f})"


class Bare:
    """The engine in this process."""

    def __init__(self, loop: EngineLoop) -> None:
        self._loop = loop

    async def ask(self, prompt: list[int], num_tokens: int = NUM_TOKENS) -> Timing:
        sampling = SamplingParams(max_tokens=num_tokens, ignore_eos=True)
        started, times = time.perf_counter(), []
        async for event in self._loop.generate(EngineRequest("bare", tuple(prompt), sampling, hash_key=b"bench")):
            if isinstance(event, TokensSampled):
                times.append(time.perf_counter())
        return Timing(times[0] - started, (times[-1] - times[0]) / max(1, len(times) - 1))


class Cluster:
    """The four services over REST.

    HTTP is written out here: httpx adds 1.7 ms of its own to a first token and aiohttp 1.0, and neither is the path.
    """

    def __init__(self, url: str, model: str) -> None:
        self._address, self._model = urlsplit(url), model

    async def ask(self, prompt: list[int], num_tokens: int = NUM_TOKENS) -> Timing:
        body: dict[str, Any] = {"model": self._model, "prompt": prompt, "max_tokens": num_tokens, "temperature": 0}
        content = json.dumps(body | {"stream": True, "ignore_eos": True, "return_token_ids": True}).encode()
        reader, writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: bench\r\nConnection: close\r\nContent-Type: application/json\r\n"
        started, times = time.perf_counter(), []
        try:
            writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            async for line in reader:
                if line.startswith(b"data: {") and json.loads(line[6:])["choices"][0].get("token_ids"):
                    times.append(time.perf_counter())
        finally:
            writer.close()
        return Timing(times[0] - started, (times[-1] - times[0]) / max(1, len(times) - 1))


@asynccontextmanager
async def bare_engine() -> AsyncGenerator[Bare, None]:
    config = WorkerConfig.load([])
    loop = EngineLoop(assemble(config).engine)
    loop.start()
    try:
        yield Bare(loop)
    finally:
        await loop.stop()


async def measure(what: Bare | Cluster, repeats: int, seed: int) -> dict[str, list[float]]:
    """Seconds by name of figure."""
    await what.ask(prompts(64, 1, seed)[0])
    figures: dict[str, list[float]] = {"each": []}
    for length in (64, 512):
        asked = prompts(length, repeats, seed + length)
        timings = [await alone(what, prompt) for prompt in asked]
        figures[f"first {length}"] = [timing.first_s for timing in timings]
        figures["each"] += [timing.each_s for timing in timings if length == 64]
    figures["first 512 cached"] = [(await alone(what, prompt, 1)).first_s for prompt in asked]
    return figures


async def alone(what: Bare | Cluster, prompt: list[int], num_tokens: int = NUM_TOKENS) -> Timing:
    """Ask when nothing is left to do for the request before: its spans, counts and page hashes have been told."""
    await asyncio.sleep(PAUSE_S)
    return await what.ask(prompt, num_tokens)


async def streams_per_s(cluster: Cluster, num_streams: int) -> float:
    asked = prompts(32, num_streams, 77)
    started = time.perf_counter()
    await asyncio.gather(*(cluster.ask(prompt, 128) for prompt in asked))
    return num_streams * 128 / (time.perf_counter() - started)


async def transfer_s(redis_url: str) -> float:
    """Seconds that decode workers have spent reading pages."""
    board = Blackboard(redis_url)
    try:
        workers = await board.processes(Role.DECODE)
    finally:
        await board.close()
    async with httpx.AsyncClient() as http:
        texts = [(await http.get(f"http://{worker.metrics_address}/metrics")).text for worker in workers]
    found = [re.search(r"^forebay_transfer_seconds_sum(?:{.*})? (\S+)$", text, re.MULTILINE) for text in texts]
    return sum(float(match.group(1)) for match in found if match)


async def long_handoff(cluster: Cluster, redis_url: str, repeats: int) -> tuple[list[float], list[float]]:
    """Seconds to first token of 1,500-token prompts, and of reading their pages."""
    firsts, reads = [], []
    for prompt in prompts(1500, repeats, 99):
        before = await transfer_s(redis_url)
        firsts.append((await cluster.ask(prompt, 2)).first_s)
        reads.append(await transfer_s(redis_url) - before)
    return firsts, reads


def report(bare: dict[str, list[float]], ours: dict[str, list[float]]) -> None:
    print("| | bare engine | four services | added, median |\n|---|---|---|---|")
    names = {"first 64": "first token of 64", "first 512": "first token of 512", "each": "each token, batch 1"}
    names["first 512 cached"] = "first token of 512, prefix cached"
    for key, name in names.items():
        added = (statistics.median(ours[key]) - statistics.median(bare[key])) * 1e3
        print(f"| {name} | {best_and_median(bare[key])} | {best_and_median(ours[key])} | {added:+.1f} ms |")


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    print(provenance.banner("bench.path"))
    async with bare_engine() as bare:
        bare_figures = await measure(bare, repeats, seed=1)
    started = time.perf_counter()
    with background.cluster() as running:
        up_s = time.perf_counter() - started
        cluster = Cluster(running.run.url, running.run.model)
        report(bare_figures, await measure(cluster, repeats, seed=1))
        rate = await streams_per_s(cluster, 8)
        firsts, reads = await long_handoff(cluster, running.run.redis_url, repeats)
    share, each_s = statistics.median(reads) / statistics.median(firsts), statistics.median(bare_figures["each"])
    print(f"\nhealthy after {up_s:.1f} s; decode at batch 1: {1 / each_s:.0f} tokens/s bare")
    print(f"8 streams: {rate:.0f} tokens/s together")
    print(
        f"1,500 tokens handed over: first token {best_and_median(firsts)}, of it reading pages {best_and_median(reads)}"
    )
    print(f"reading pages is {share:.1%} of the time to first token, most of it behind the computation")


if __name__ == "__main__":
    asyncio.run(main())
