"""The real model on CPUs, a core for each of two workers: what long prompts do to streams that run."""

import asyncio
import random
import subprocess
from dataclasses import dataclass

from bench.placement.client import Client
from bench.placement.workloads import token_ids
from bench.serve.client import Answer
from bench.serve.measures import gaps_ms, spread, ttft_ms
from cli.background import Background, cluster


@dataclass(frozen=True, slots=True)
class Load:
    """`num_streams` run all the time; a prompt of `long_tokens` comes every `every_s`."""

    num_streams: int = 4
    stream_tokens: int = 200
    long_tokens: int = 768
    every_s: float = 3.0
    duration_s: float = 45.0
    seed: int = 0


def measure(load: Load) -> None:
    """Print time per token of the streams, aggregated and disaggregated, as milliseconds."""
    print("\n| | tokens | time per token p50 ms | p99 | tokens/s per stream | long prompts | their TTFT p50 ms |")
    print("|---|---|---|---|---|---|---|")
    for name, num_prefill, num_decode in (("aggregated", 0, 2), ("disaggregated", 1, 1)):
        counts = ("--prefill", str(num_prefill), "--decode", str(num_decode))
        with cluster(*counts, "--worker-flags", "--speculation off --max-step-tokens 256") as running:
            pin(running)
            print(f"| {name} | {asyncio.run(_row(Client(running.run.url, running.run.model), load))} |", flush=True)


def pin(running: Background) -> None:
    """Each worker, with all its threads, to a core of its own."""
    workers = [process for process in running.run.processes if process.role in ("prefill", "decode")]
    for core, worker in enumerate(sorted(workers, key=lambda process: process.name)):
        subprocess.run(["taskset", "-a", "-p", "-c", str(core), str(worker.pid)], check=True, capture_output=True)


async def _row(client: Client, load: Load) -> str:
    ended, chance = asyncio.Event(), random.Random(f"streams {load.seed}")
    streams = [asyncio.create_task(_stream(client, load, number, ended)) for number in range(load.num_streams)]
    firsts: list[asyncio.Task[Answer]] = []
    for _ in range(int(load.duration_s / load.every_s)):
        await asyncio.sleep(load.every_s)
        firsts.append(asyncio.create_task(_long(client, token_ids(chance, load.long_tokens))))
    ended.set()
    answers = [answer for answers in await asyncio.gather(*streams) for answer in answers]
    long = [answer for answer in await asyncio.gather(*firsts) if answer.fault is None]
    gaps = [gap for answer in answers for gap in gaps_ms(answer)]
    each, first = spread(gaps) or {}, spread([ttft_ms(answer) for answer in long]) or {}
    rate = 1000 / each["mean"]
    return f"{len(gaps)} | {each['p50']:.1f} | {each['p99']:.1f} | {rate:.1f} | {len(long)} | {first['p50']:.0f}"


async def _long(client: Client, prompt: tuple[int, ...]) -> Answer:
    return (await client.ask(prompt, 2)).answer


async def _stream(client: Client, load: Load, number: int, ended: asyncio.Event) -> list[Answer]:
    """One stream after the other until the end."""
    chance, answers = random.Random(f"stream {number} {load.seed}"), []
    while not ended.is_set():
        answers.append((await client.ask(token_ids(chance, 32), load.stream_tokens)).answer)
        if answers[-1].fault:
            raise RuntimeError(answers[-1].fault)
    return answers
