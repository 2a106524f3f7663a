"""The path alone: what gateway and router cost for text prompts, before workers that take no time."""

import asyncio
import random
import time
from collections.abc import Sequence
from statistics import median

import uvloop

from bench.placement.client import Client
from bench.serve.measures import ttft_ms
from cli.background import Background, cluster, cpu_s
from shared.models import store
from shared.models.catalogue import DEFAULT_MODEL

WORDS = (
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
)
MS_PER_TOKEN = 0.1
NUM_OUTPUT = 32
IN_NO_TIME = "--sim-prefill-ms-per-token 0 --sim-decode-ms 0 --sim-decode-ms-per-sequence 0 --max-num-sequences 256"


def prompt(chance: random.Random, num_tokens: int) -> str:
    """Words that are a token each, with the space before them."""
    return " ".join(chance.choices(WORDS, k=num_tokens))


def flags(of_workers: str) -> tuple[str, ...]:
    """Of a cluster of two sim workers, behind real tokenization."""
    gateway = f"--tokenizer sim={store.resolve(DEFAULT_MODEL)}"
    return (
        "--engine",
        "sim",
        "--prefill",
        "0",
        "--decode",
        "2",
        "--gateway-flags",
        gateway,
        "--worker-flags",
        of_workers,
    )


def measure(num_requests: int, concurrencies: list[int], seed: int) -> None:
    """Print CPU and throughput at each number of streams, then what is added to the first token."""
    print("| streams | requests/s | CPU s per 1,000 requests: gateway | router | workers | blackboard | client |")
    print("|---|---|---|---|---|---|---|")
    with cluster(*flags(IN_NO_TIME)) as running:
        for concurrency in concurrencies:
            print(_row(running, concurrency, num_requests, seed), flush=True)
    timed = f"--sim-prefill-ms-per-token {MS_PER_TOKEN} --sim-decode-ms 0"
    with cluster(*flags(timed)) as running:
        client = Client(running.run.url, running.run.model)
        for num_tokens in (512, 4096):
            added = uvloop.run(_added_ms(client, num_tokens, seed))
            print(f"added to the first token of {num_tokens}: median {median(added):.1f} ms, best {min(added):.1f} ms")


def _row(running: Background, concurrency: int, num_requests: int, seed: int) -> str:
    chance = random.Random(f"path {concurrency} {seed}")
    prompts = [prompt(chance, 512) for _ in range(num_requests)]
    before, own, started = cpu_s(running), time.process_time(), time.perf_counter()
    num_failed = uvloop.run(ask_all(Client(running.run.url, running.run.model), prompts, concurrency))
    wall_s, own = time.perf_counter() - started, time.process_time() - own
    spent = {role: (after - before[role]) * 1000 / num_requests for role, after in cpu_s(running).items()}
    workers = spent["decode"] + spent.get("prefill", 0.0)
    failed = f" ({num_failed} failed)" if num_failed else ""
    return (
        f"| {concurrency} | {num_requests / wall_s:.1f}{failed} | {spent['gateway']:.2f} | {spent['router']:.2f} "
        f"| {workers:.2f} | {spent['blackboard']:.2f} | {own * 1000 / num_requests:.2f} |"
    )


async def ask_all(client: Client, prompts: Sequence[str], concurrency: int) -> int:
    """Ask everything, so many at once; how many failed."""
    free, failed = asyncio.Semaphore(concurrency), 0

    async def one(text: str) -> None:
        nonlocal failed
        async with free:
            reply = await client.ask(text, NUM_OUTPUT, ids=False)
        failed += reply.answer.fault is not None

    await asyncio.gather(*map(one, prompts))
    return failed


async def _added_ms(client: Client, num_tokens: int, seed: int, repeats: int = 21) -> list[float]:
    """TTFT of one prompt after the other, less what the sim engine takes for so many tokens."""
    chance, added = random.Random(f"added {num_tokens} {seed}"), []
    for _ in range(repeats):
        answer = (await client.ask(prompt(chance, num_tokens), 1)).answer
        if answer.fault:
            raise RuntimeError(answer.fault)
        added.append(ttft_ms(answer) - answer.num_input * MS_PER_TOKEN)
    return added
