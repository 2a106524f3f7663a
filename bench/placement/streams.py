"""A real model on two workers: what long prompts do to streams that run.

On CPUs each worker has a core, on GPUs (`--gpus 2`) a GPU of its own. Three fleets hold the same load: two workers
that do both; one for prefill and one for decode, always used so; the same two, used by cost. A worker of two ranks on
both GPUs can be added. Gateway, router, blackboard and this client run on the same cores: where one of two workers
decodes alone they keep off its core, as they would in a cluster of more machines.
"""

import asyncio
import os
import random
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

from bench.placement.beliefs import watch
from bench.placement.client import Client
from bench.placement.workloads import token_ids
from bench.serve.client import Answer
from bench.serve.measures import spread, ttft_ms
from cli.background import Background, cluster

ALWAYS = "--local-prefill-max-tokens 0 --remote-prefill-min-tokens 1"
# Prefill and decode workers, ranks of each, flags of the router.
FLEETS = {
    "aggregated": (0, 2, 1, ""),
    "disaggregated": (1, 1, 1, ALWAYS),
    "conditional": (1, 1, 1, ""),
    "one worker of two ranks": (0, 1, 2, ""),
}
DEFAULT_FLEETS = ("aggregated", "disaggregated", "conditional")
HEAD = (
    "| | tokens | time per token p50 ms | p99 | tokens/s per stream | long prompts | TTFT p50 ms | p90 "
    "| their time per token p50 ms | all tokens/s |"
)


@dataclass(frozen=True, slots=True)
class Load:
    """`num_streams` run all the time; a prompt of `long_tokens`, which is answered by `long_output` tokens, comes every
    `every_s`. For `warm_s` nothing is measured."""

    num_streams: int = 4
    stream_tokens: int = 200
    long_tokens: int = 768
    long_output: int = 2
    every_s: float = 3.0
    duration_s: float = 45.0
    warm_s: float = 6.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fleet:
    """What to start: `gpus` of 0 pins workers to cores, where each computes with one thread. Flags are those of all
    workers, and of routers."""

    model: str = ""
    gpus: int = 0
    worker_flags: str = "--speculation off --max-step-tokens 256"
    router_flags: str = ""

    def flags(self, num_prefill: int, num_decode: int, num_ranks: int, router_flags: str) -> list[str]:
        """For `forebay up`."""
        counts = {"prefill": num_prefill, "decode": num_decode, "tp": num_ranks, "gpus": self.gpus}
        return [
            *(("--model", self.model) if self.model else ()),
            *(text for name, count in counts.items() for text in (f"--{name}", str(count))),
            *("--worker-flags", f"{self.worker_flags} {'' if self.gpus else '--num-threads 1'}"),
            *("--router-flags", f"{self.router_flags} {router_flags}"),
        ]


@dataclass(frozen=True, slots=True)
class Window:
    """What was measured: from one time to another."""

    begin_s: float
    end_s: float

    def gaps_ms(self, answers: Sequence[Answer]) -> list[float]:
        """Times between arrivals, of one token each if the server does not bundle them."""
        return [
            (later - earlier) * 1e3
            for answer in answers
            for (earlier, _), (later, _) in pairwise(answer.arrivals)
            if self.begin_s <= earlier and later <= self.end_s
        ]

    def num_tokens(self, answers: Sequence[Answer]) -> int:
        """Those that came."""
        return sum(count for answer in answers for at_s, count in answer.arrivals if self.begin_s <= at_s <= self.end_s)


def measure(fleet: Fleet, loads: Sequence[Load], names: Sequence[str], explained: bool) -> None:
    """Print a row for each fleet and load, as soon as it is known; `explained` by what its router believes."""
    cores = os.sched_getaffinity(0)
    for name in names:
        os.sched_setaffinity(0, cores)
        started = time.perf_counter()
        with cluster(*fleet.flags(*FLEETS[name])) as running:
            print(f"\n{name}: up after {time.perf_counter() - started:.1f} s\n{HEAD}")
            print("|---" * HEAD.count(" | ") + "|---|", flush=True)
            if not fleet.gpus:
                pin(running)
            for load in loads:
                title = f"{name}, {load.long_tokens} in, {load.long_output} out, every {load.every_s:g} s"
                print(f"| {title} | {asyncio.run(_held(running, load, explained))} |", flush=True)


def pin(running: Background) -> None:
    """Each worker, with all its threads, to a core of its own; all others to those where prompts are computed."""
    workers = [process for process in running.run.processes if process.role in ("prefill", "decode")]
    computing = []
    for core, worker in enumerate(sorted(workers, key=lambda process: process.name)):
        _bind(worker.pid, str(core))
        if worker.role == "prefill" or len({each.role for each in workers}) == 1:
            computing.append(str(core))
    others = [process.pid for process in running.run.processes if process not in workers]
    for pid in (*others, os.getpid()):
        _bind(pid, ",".join(computing))


def _bind(pid: int | None, cores: str) -> None:
    subprocess.run(["taskset", "-a", "-p", "-c", cores, str(pid)], check=True, capture_output=True)


async def _held(running: Background, load: Load, explained: bool) -> str:
    """The figures of a load; before them, if it is to be `explained`, what the router believes every other second."""
    run = running.run
    client = Client(run.url, run.model)
    if not explained:
        return await _row(client, load)
    watching = asyncio.create_task(watch(run.redis_url, run.model, load.long_tokens, load.long_output))
    try:
        return await _row(client, load)
    finally:
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching


async def _row(client: Client, load: Load) -> str:
    ended, chance = asyncio.Event(), random.Random(f"streams {load}")
    streams = [asyncio.create_task(_stream(client, load, number, ended)) for number in range(load.num_streams)]
    begin_s = time.perf_counter()
    window, firsts = (
        Window(begin_s + load.warm_s, begin_s + load.warm_s + load.duration_s),
        list[asyncio.Task[Answer]](),
    )
    for number in range(1, 1 + int((load.warm_s + load.duration_s) / load.every_s)):
        await asyncio.sleep(begin_s + number * load.every_s - time.perf_counter())
        firsts.append(asyncio.create_task(_long(client, token_ids(chance, load.long_tokens), load.long_output)))
    await asyncio.sleep(window.end_s - time.perf_counter())
    ended.set()
    answers = [answer for answers in await asyncio.gather(*streams) for answer in answers]
    long = await asyncio.gather(*firsts)
    faults = {answer.fault for answer in long if answer.fault is not None}
    if faults:
        raise RuntimeError(f"long prompts failed: {faults}")
    return _figures(window, load, answers, long)


def _figures(window: Window, load: Load, streams: Sequence[Answer], long: Sequence[Answer]) -> str:
    asked = [answer for answer in long if window.begin_s <= answer.sent_s <= window.end_s]
    each, theirs = (spread(window.gaps_ms(answers)) or {"p50": 0.0, "p99": 0.0} for answers in (streams, long))
    first = spread([ttft_ms(answer) for answer in asked]) or {"p50": 0.0, "p90": 0.0}
    num_tokens = window.num_tokens(streams)
    rate, whole = (count / load.duration_s for count in (num_tokens, num_tokens + window.num_tokens(long)))
    return (
        f"{num_tokens} | {each['p50']:.1f} | {each['p99']:.1f} | {rate / load.num_streams:.1f} | {len(asked)} | "
        f"{first['p50']:.0f} | {first['p90']:.0f} | {theirs['p50']:.1f} | {whole:.0f}"
    )


async def _long(client: Client, prompt: tuple[int, ...], output_tokens: int) -> Answer:
    return (await client.ask(prompt, output_tokens)).answer


async def _stream(client: Client, load: Load, number: int, ended: asyncio.Event) -> list[Answer]:
    """One stream after the other until the end."""
    chance, answers = random.Random(f"stream {number} {load}"), []
    while not ended.is_set():
        answers.append((await client.ask(token_ids(chance, 32), load.stream_tokens)).answer)
        if answers[-1].fault:
            raise RuntimeError(answers[-1].fault)
    return answers
