"""How long pages stay taken when whoever needed them is gone."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx

from tests.chaos.faults import KILL, Faults
from tests.chaos.watch import scrape
from tests.e2e.cluster import RunningCluster

NUM_STREAMS = 12
LONG_PROMPT = [token * 7 % 30_000 + 10 for token in range(3_000)]
LOOK_S = 0.02


async def clients_leave(cluster: RunningCluster, url: str, deadline_s: float) -> float:
    """Seconds until no page is held or leased after all clients went away amid their outputs."""
    async with _streams(cluster, url, LONG_PROMPT[:300]) as started:
        await asyncio.gather(*(event.wait() for event in started))
        addresses = await _metrics_addresses(cluster, "prefill", "decode")
    return await _until_free(addresses, deadline_s)


async def readers_die(cluster: RunningCluster, url: str, faults: Faults, deadline_s: float) -> float:
    """Seconds until no page of a prefill worker is taken, after all decode workers were killed amid handoffs."""
    addresses = await _metrics_addresses(cluster, "prefill")
    names = [name for name in await cluster.status() if name.startswith("decode")]
    async with _streams(cluster, url, LONG_PROMPT), httpx.AsyncClient(trust_env=False) as http:
        async with asyncio.timeout(deadline_s):
            while not await _num_used(http, addresses):  # noqa: ASYNC110 - workers tell nobody
                await asyncio.sleep(LOOK_S)
        await asyncio.gather(*(faults.hit(name, KILL) for name in names))
    return await _until_free(addresses, deadline_s)


@asynccontextmanager
async def _streams(cluster: RunningCluster, url: str, prompt: list[int]) -> AsyncIterator[list[asyncio.Event]]:
    """Streams with an event each for their first chunk; cut off at the end."""
    started = [asyncio.Event() for _ in range(NUM_STREAMS)]
    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        tasks = [
            asyncio.create_task(_stream(http, cluster.model, [number, *prompt], event))
            for number, event in enumerate(started)
        ]
        try:
            yield started
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def _stream(http: httpx.AsyncClient, model: str, prompt: list[int], started: asyncio.Event) -> None:
    body = {"model": model, "prompt": prompt, "max_tokens": 3_000, "ignore_eos": True, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_lines():
            started.set()


async def _until_free(addresses: list[str], deadline_s: float) -> float:
    began = time.monotonic()
    async with httpx.AsyncClient(trust_env=False) as http:
        while await _num_used(http, addresses):
            assert time.monotonic() - began < deadline_s, f"pages are taken after {deadline_s} s"
            await asyncio.sleep(LOOK_S)
    return time.monotonic() - began


async def _num_used(http: httpx.AsyncClient, addresses: list[str]) -> float:
    found = await asyncio.gather(*(scrape(http, address) for address in addresses))
    return sum(metrics["forebay_pages.held"] + metrics["forebay_pages.leased"] for metrics in found)


async def _metrics_addresses(cluster: RunningCluster, *roles: str) -> list[str]:
    return [row["metrics_address"] for row in (await cluster.status()).values() if row["role"] in roles]
