"""Sends a workload and collects the answers."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.serve.client import Answer, Client
from bench.serve.workload import Ask, Workload, asks, warmup


@dataclass(frozen=True, slots=True)
class Run:
    """The answers, in the order of the asks, and how long they took together."""

    answers: tuple[Answer, ...]
    wall_s: float


async def run(client: Client, workload: Workload, clock: Callable[[], float] = time.perf_counter) -> Run:
    """Warm up, then send the workload. Raises ValueError for a workload that makes no sense."""
    planned = asks(workload)
    for ask in warmup(workload):
        await client.ask(ask)
    start = clock()
    if workload.rate is None:
        answers = await _whenever_free(client, planned, workload.concurrency)
    else:
        answers = await _on_time(client, planned)
    return Run(tuple(answers), clock() - start)


async def _whenever_free(client: Client, planned: Sequence[Ask], concurrency: int) -> list[Answer]:
    """`concurrency` callers, each sending its next request when its last is answered."""
    free = asyncio.Semaphore(concurrency)

    async def ask_in_turn(ask: Ask) -> Answer:
        async with free:
            return await client.ask(ask)

    return await asyncio.gather(*map(ask_in_turn, planned))


async def _on_time(client: Client, planned: Sequence[Ask]) -> list[Answer]:
    """Each at its time, whether or not the server keeps up."""
    start = asyncio.get_running_loop().time()

    async def ask_at(ask: Ask) -> Answer:
        await asyncio.sleep(start + ask.at_s - asyncio.get_running_loop().time())
        return await client.ask(ask)

    return await asyncio.gather(*map(ask_at, planned))
