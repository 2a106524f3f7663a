"""What the path adds to the first token of a request alone, beside other checkouts, in turns: without a model.

    python -m bench.firsts [--rounds 100] [--text] [--beside CHECKOUT ...]

Each checkout's cluster is one prefill and one decode worker with sim engines, which take 0.02 ms for a token of a
prompt and 2 ms for a step, so that hops are most of what a first token waits for, and nothing else computes. Each round
asks every cluster, in an order of chance, for the first token of a prompt of 64 tokens (prefilled on the decode
worker), of one of 512 (handed over) and of the latter again (its prefix is cached). Printed are medians (best), and the
median of the rounds' differences with its 95 % interval. `bench.path` has the real model, the bare engine, and more
noise.

With `--text` clusters and prompts are those by which `bench.placement path` measures what is added to a first token:
texts of 512 and of 4,096 tokens, behind real tokenization, and two decode workers that take 0.1 ms for each token of a
prompt. That is in the figures.
"""

import argparse
import asyncio
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from statistics import median

import uvloop

from bench import provenance, turns
from bench.asked import Cluster
from bench.placement import path
from cli import background
from cli.process import ROOT

PAUSE_S = 0.06
WORKERS = "--sim-prefill-ms-per-token 0.02 --sim-decode-ms 2 --speculation off"
ROUTERS = "--local-prefill-max-tokens 64"
FLAGS = ("--engine", "sim", "--worker-flags", WORKERS, "--router-flags", ROUTERS)
KINDS = {
    "64, prefilled on the decode worker": (64, 1),
    # A second token, so that the decode worker reads the pages; the next one finds them there.
    "512, handed over": (512, 2),
    "512, prefix cached": (512, 1),
}
"""Tokens of the prompt and of the output."""

TEXTS = {"text of 512": (512, 1), "text of 4,096": (4096, 1)}
TEXT_FLAGS = path.flags(f"--sim-prefill-ms-per-token {path.MS_PER_TOKEN} --sim-decode-ms 0")

Found = dict[str, dict[str, list[float]]]
"""Milliseconds to the first token by kind of prompt and checkout, round by round."""


async def measure(
    clusters: Mapping[str, Cluster], kinds: Mapping[str, tuple[int, int]], num_rounds: int, chance: Random, found: Found
) -> None:
    """Ask every cluster for everything, in turns. What is `found` is of whole turns, also if it is ended before its
    time."""

    async def one(name: str, prompt: list[int] | str, num_output: int, took: dict[str, float]) -> None:
        await asyncio.sleep(PAUSE_S)
        took[name] = (await clusters[name].ask(prompt, num_output)).first_ms

    for _ in range(num_rounds):
        prompts: dict[int, list[int] | str] = {}
        for kind, (length, num_output) in kinds.items():
            if length not in prompts:
                ids = kinds is KINDS
                prompts[length] = chance.choices(range(100, 32_000), k=length) if ids else path.prompt(chance, length)
            took: dict[str, float] = {}
            ways = {name: partial(one, name, prompts[length], num_output, took) for name in clusters}
            await turns.in_turns(ways, chance)
            for name, first_ms in took.items():
                found[kind][name].append(first_ms)


def report(found: Found, names: list[str]) -> None:
    """Print the table; differences are of what stands first less the others: below 0, it is sooner."""
    print(f"| first token, ms | {' | '.join(names)} |{' difference (95 %) |' * (len(names) - 1)}")
    print("|---" * (2 * len(names)) + "|")
    for kind, by_name in found.items():
        cells = [f"{median(by_name[name]):.2f} ({min(by_name[name]):.2f})" for name in names]
        cells += [f"{turns.difference(by_name[name], by_name[names[0]]):+.2f}" for name in names[1:]]
        print(f"| {kind} | {' | '.join(cells)} |")


def _nothing() -> Found:
    return defaultdict(lambda: defaultdict(list))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--beside", action="append", default=[], help="another checkout, whose cluster takes turns")
    parser.add_argument("--text", action="store_true", help="texts, as bench.placement path has them")
    args = parser.parse_args()
    kinds, flags = (TEXTS, TEXT_FLAGS) if args.text else (KINDS, FLAGS)
    print(provenance.banner("bench.firsts"), flush=True)
    checkouts = {"here": ROOT} | {Path(path).resolve().name: Path(path).resolve() for path in args.beside}
    chance = Random(args.seed)
    with ExitStack() as stack:
        running = {name: stack.enter_context(background.cluster(*flags, root=at)) for name, at in checkouts.items()}
        clusters = {name: Cluster(one) for name, one in running.items()}
        uvloop.run(measure(clusters, kinds, 5, chance, _nothing()))
        found = _nothing()
        try:
            uvloop.run(measure(clusters, kinds, args.rounds, chance, found))
        finally:
            report(found, list(clusters))


if __name__ == "__main__":
    main()
