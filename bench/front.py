"""What gateway and router take of the processor for a request, beside another checkout of this repository in turns.

    python -m bench.front [--rounds 9] [--streams 16 256] [--beside CHECKOUT]

Text prompts of 512 tokens are answered by 32, over REST with streaming, by two sim workers that take no time; tokenizer
and detokenizer are the default model's. Printed are CPU seconds per 1,000 requests, of each role and of this client,
and seconds by the clock: median (best) of the rounds, and the median of the rounds' differences with its 95 % interval.
"""

import argparse
import time
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
from bench.placement.path import IN_NO_TIME, ask_all, flags, prompt
from cli import background
from cli.background import Background
from cli.process import ROOT

PROMPT_TOKENS = 512
# A burst at the start shows in few requests, and the clock of a process ticks every 10 ms.
MIN_REQUESTS = 200
BOTH, CLIENT, WALL = "gateway and router", "this client", "by the clock, s per 1,000 requests"

Found = dict[tuple[int, str], dict[str, list[float]]]
"""CPU seconds per 1,000 requests by number of streams and role, then by checkout, round by round."""


async def measure(
    clusters: Mapping[str, Background], streams: Sequence[int], num_rounds: int, chance: Random, found: Found
) -> None:
    """Put the same load on each cluster, in turns. What is `found` is of whole turns, also if it is ended before its
    time."""

    async def one(name: str, num_streams: int, prompts: Sequence[str], took: dict[str, dict[str, float]]) -> None:
        running = clusters[name]
        before, own_s, started_s = background.cpu_s(running), time.process_time(), time.perf_counter()
        if await ask_all(Client(running.run.url, running.run.model), prompts, num_streams):
            raise RuntimeError("requests failed")
        wall_s, own_s = time.perf_counter() - started_s, time.process_time() - own_s
        took_s = {role: s - before[role] for role, s in background.cpu_s(running).items()}
        took_s |= {BOTH: took_s["gateway"] + took_s["router"], CLIENT: own_s, WALL: wall_s}
        took[name] = {role: s * 1e3 / len(prompts) for role, s in took_s.items()}

    for _ in range(num_rounds):
        for num_streams in streams:
            prompts = [prompt(chance, PROMPT_TOKENS) for _ in range(max(MIN_REQUESTS, num_streams))]
            took: dict[str, dict[str, float]] = {}
            await turns.in_turns({name: partial(one, name, num_streams, prompts, took) for name in clusters}, chance)
            for name, by_role in took.items():
                for role, spent_s in by_role.items():
                    found[num_streams, role][name].append(spent_s)


def report(found: Found, names: Sequence[str]) -> None:
    """Print the table."""
    print(f"| streams | CPU s per 1,000 requests | {' | '.join(names)} |{' difference (95 %) |' * (len(names) - 1)}")
    print("|---" * (1 + 2 * len(names)) + "|")
    for (num_streams, role), by_name in found.items():
        cells = [f"{median(by_name[name]):.2f} ({min(by_name[name]):.2f})" for name in names]
        cells += [f"{turns.difference(by_name[name], by_name[names[0]]):+.2f}" for name in names[1:]]
        print(f"| {num_streams} | {role} | {' | '.join(cells)} |")


def _nothing() -> Found:
    return defaultdict(lambda: defaultdict(list))


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
    chance = Random(args.seed)
    with ExitStack() as stack:
        clusters = {
            name: stack.enter_context(background.cluster(*flags(IN_NO_TIME), root=at)) for name, at in checkouts.items()
        }
        uvloop.run(measure(clusters, args.streams, 1, chance, _nothing()))
        found = _nothing()
        try:
            uvloop.run(measure(clusters, args.streams, args.rounds, chance, found))
        finally:
            report(found, list(clusters))


if __name__ == "__main__":
    main()
