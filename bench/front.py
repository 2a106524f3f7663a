"""What gateway and router take of the processor for a request, beside another checkout of this repository in turns.

    python -m bench.front [--rounds 9] [--streams 16 256] [--beside CHECKOUT]

Text prompts of 512 tokens are answered by 32, over REST with streaming, by two sim workers that take no time; tokenizer
and detokenizer are the default model's. Printed are CPU seconds per 1,000 requests, median (best) of the rounds, and
the median of the rounds' differences with its 95 % interval.
"""

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from statistics import median

import uvloop

from bench import provenance, turns
from bench.placement.client import Client
from bench.placement.path import NUM_OUTPUT, prompt
from cli import background
from cli.background import Background
from cli.process import ROOT
from shared.models import store
from shared.models.catalogue import DEFAULT_MODEL

PROMPT_TOKENS = 512
# A burst at the start shows in few requests, and the clock of a process ticks every 10 ms.
MIN_REQUESTS = 200
FREE = "--sim-prefill-ms-per-token 0 --sim-decode-ms 0 --sim-decode-ms-per-sequence 0 --max-num-sequences 256"
FLAGS = ("--engine", "sim", "--prefill", "0", "--decode", "2", "--worker-flags", FREE)
BOTH = "gateway and router"

Found = dict[tuple[int, str], dict[str, list[float]]]
"""CPU seconds per 1,000 requests by number of streams and role, then by checkout, round by round."""


async def burst(client: Client, prompts: Sequence[str], num_streams: int) -> None:
    """Have all prompts answered, so many at once. Raises RuntimeError if one is not."""
    free = asyncio.Semaphore(num_streams)

    async def one(text: str) -> None:
        async with free:
            answer = (await client.ask(text, NUM_OUTPUT, ids=False)).answer
        if answer.fault:
            raise RuntimeError(answer.fault)

    await asyncio.gather(*map(one, prompts))


async def measure(clusters: Mapping[str, Background], streams: Sequence[int], num_rounds: int, chance: Random) -> Found:
    """Put the same load on each cluster, in turns."""
    found: Found = defaultdict(lambda: defaultdict(list))

    async def one(name: str, num_streams: int, prompts: Sequence[str]) -> None:
        running = clusters[name]
        before = background.cpu_s(running)
        await burst(Client(running.run.url, running.run.model), prompts, num_streams)
        spent = {role: (s - before[role]) * 1e3 / len(prompts) for role, s in background.cpu_s(running).items()}
        for role, taken in {BOTH: spent["gateway"] + spent["router"], **spent}.items():
            found[num_streams, role][name].append(taken)

    for _ in range(num_rounds):
        for num_streams in streams:
            prompts = [prompt(chance, PROMPT_TOKENS) for _ in range(max(MIN_REQUESTS, num_streams))]
            await turns.in_turns({name: partial(one, name, num_streams, prompts) for name in clusters}, chance)
    return found


def report(found: Found, names: Sequence[str]) -> None:
    """Print the table."""
    print(f"| streams | CPU s per 1,000 requests | {' | '.join(names)} |{' difference (95 %) |' * (len(names) - 1)}")
    print("|---" * (1 + 2 * len(names)) + "|")
    for (num_streams, role), by_name in found.items():
        cells = [f"{median(by_name[name]):.2f} ({min(by_name[name]):.2f})" for name in names]
        cells += [f"{turns.difference(by_name[name], by_name[names[0]]):+.2f}" for name in names[1:]]
        print(f"| {num_streams} | {role} | {' | '.join(cells)} |")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--streams", type=int, nargs="+", default=[16, 256], help="requests at once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--beside", help="another checkout, whose cluster takes turns")
    args = parser.parse_args()
    print(provenance.banner("bench.front"), flush=True)
    checkouts = {"here": ROOT} | ({"beside": Path(args.beside).resolve()} if args.beside else {})
    flags, chance = (*FLAGS, "--gateway-flags", f"--tokenizer sim={store.resolve(DEFAULT_MODEL)}"), Random(args.seed)
    with ExitStack() as stack:
        clusters = {name: stack.enter_context(background.cluster(*flags, root=at)) for name, at in checkouts.items()}
        uvloop.run(measure(clusters, args.streams, 1, chance))
        report(uvloop.run(measure(clusters, args.streams, args.rounds, chance)), list(clusters))


if __name__ == "__main__":
    main()
