"""What the four-service path costs beside the bare engine, with the default model, request by request in turns.

    python -m bench.path [--rounds 30] [--handed-over] [--beside CHECKOUT] [--worker-flags "--speculation off"]

The bare engine is in this process, the services are a cluster of one prefill and one decode worker, asked over REST
with streaming; both have as many threads as the machine has cores, and get the same prompts with the same settings.
While one answers the other has nothing to do. Each round asks both, in an order of chance, for the outputs of a prompt
of 64 tokens (prefilled on the decode worker, which routers are told to do; left alone they may hand it over), of one of
512 (handed over), and of the latter again (its prefix is cached). With `--handed-over` only the second of these is
asked: its kernels take 360 ms, and vary by more than what the path adds, so that it takes hundreds of pairs to tell.
With `--beside` a cluster of another checkout of this repository takes its turns, too.

Printed are medians, the median of what the path adds in each pair with its 95 % interval, whether prompts went the way
that they should, and what each process costs when nobody asks. Drafts are off unless the flags, which are the bare
engine's, too, say otherwise: how many are made depends on what was measured before, so a token would not be the same
work on both sides. `--loads` measures more of the cluster alone: 8 streams together, and of a handed-over prompt of
1,500 tokens the time that reading its pages took.
"""

import argparse
import asyncio
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random

import httpx
import uvloop

from bench import provenance, turns
from bench.asked import Asked, Cluster, Timing, bare_engine
from cli import background
from cli.background import Background
from cli.process import ROOT
from shared.blackboard.board import Blackboard
from shared.blackboard.records import Role

NUM_TOKENS = 64
PAUSE_S = 0.15
# What a cluster does behind a request, its index and its leases, has an end before this.
IDLE_AFTER_S, IDLE_S = 0.5, 4.0
BARE, OURS = "bare engine", "four services"
ROUTER_FLAGS = ("--router-flags", "--local-prefill-max-tokens 64")

Found = dict[str, dict[str, list[float]]]
"""Milliseconds by figure and by who was asked, round by round."""


async def measure(
    asked: dict[str, Asked], num_rounds: int, chance: Random, found: Found, *, handed_over: bool = False
) -> None:
    """Ask everybody, in turns. What is `found` is of whole turns, also if it is ended before its time."""

    async def one(name: str, prompt: Sequence[int], num_tokens: int, took: dict[str, Timing]) -> None:
        await asyncio.sleep(PAUSE_S)
        took[name] = await asked[name].ask(prompt, num_tokens)

    for _ in range(num_rounds):
        short, long = _prompt(chance, 64), _prompt(chance, 512)
        figures = [
            ("first token of 64", short, NUM_TOKENS),
            ("first token of 512", long, 2),
            ("first token of 512, prefix cached", long, 1),
        ]
        for figure, prompt, num_tokens in figures[1:2] if handed_over else figures:
            took: dict[str, Timing] = {}
            await turns.in_turns({name: partial(one, name, prompt, num_tokens, took) for name in asked}, chance)
            for name, timing in took.items():
                found[figure][name].append(timing.first_ms)
                if num_tokens == NUM_TOKENS:
                    found["each token, batch 1"][name].append(timing.each_ms)


def report(found: Found, names: Sequence[str]) -> None:
    """Print the table of medians and of what is added."""
    print(f"| ms, median (best) | {' | '.join(names)} |{' added by the path (95 %) |' * (len(names) - 1)}")
    print("|---" * (2 * len(names)) + "|")
    for figure, by_name in found.items():
        cells = [f"{statistics.median(by_name[name]):.1f} ({min(by_name[name]):.1f})" for name in names]
        cells += [str(turns.difference(by_name[names[0]], by_name[name])) for name in names[1:]]
        print(f"| {figure} | {' | '.join(cells)} |")
    for older, newer in zip(names[2:], names[1:], strict=False):
        told = [f"{figure} {turns.difference(each[older], each[newer])}" for figure, each in found.items()]
        print(f"\n{newer} beside {older}, ms: {'; '.join(told)}")


async def reads(redis_url: str) -> tuple[int, float]:
    """How often decode workers have read pages, and the seconds that it took."""
    board = Blackboard(redis_url)
    try:
        workers = await board.processes(Role.DECODE)
    finally:
        await board.close()
    async with httpx.AsyncClient() as http:
        text = "\n".join([(await http.get(f"http://{worker.metrics_address}/metrics")).text for worker in workers])
    sums = [
        sum(map(float, re.findall(rf"^forebay_transfer_seconds_{what}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))
        for what in ("count", "sum")
    ]
    return int(sums[0]), sums[1]


async def idle_shares(running: Background) -> dict[str, float]:
    """What each process takes of a core while nobody asks, right after a request, in percent by role."""
    await asyncio.sleep(IDLE_AFTER_S)
    before = background.cpu_s(running)
    await asyncio.sleep(IDLE_S)
    return {role: (after - before[role]) * 100 / IDLE_S for role, after in background.cpu_s(running).items()}


async def loads(cluster: Cluster, running: Background, chance: Random, num_rounds: int = 7) -> None:
    """Print what 8 streams get together, and what handing over 1,500 tokens takes."""
    asked = [_prompt(chance, 32) for _ in range(8)]
    started_s = time.perf_counter()
    await asyncio.gather(*(cluster.ask(prompt, 128) for prompt in asked))
    print(f"\n8 streams: {len(asked) * 128 / (time.perf_counter() - started_s):.0f} tokens/s together")
    firsts, took = list[float](), list[float]()
    for _ in range(num_rounds):
        before = await reads(running.run.redis_url)
        firsts.append((await cluster.ask(_prompt(chance, 1500), 2)).first_ms)
        await asyncio.sleep(PAUSE_S)
        took.append(((await reads(running.run.redis_url))[1] - before[1]) * 1e3)
    first, read = statistics.median(firsts), statistics.median(took)
    print(f"1,500 tokens handed over: first token after {first:.0f} ms, {read:.0f} ms of them reading pages,")
    print(f"{read / first:.1%}, most of it behind the computation")


def _nothing() -> Found:
    return defaultdict(lambda: defaultdict(list))


def _prompt(chance: Random, length: int) -> list[int]:
    return chance.choices(range(100, 40_000), k=length)


async def run(args: argparse.Namespace, checkouts: dict[str, Path]) -> None:
    """Measure and print."""
    chance, flags = Random(args.seed), args.worker_flags
    async with bare_engine(flags.split()) as bare:
        with ExitStack() as stack:
            started_s, running = time.perf_counter(), dict[str, Background]()
            for name, root in checkouts.items():
                cluster = background.cluster("--worker-flags", flags, *ROUTER_FLAGS, root=root)
                running[name] = stack.enter_context(cluster)
            print(f"healthy after {(time.perf_counter() - started_s) / len(running):.1f} s\n")
            clusters = {name: Cluster(one) for name, one in running.items()}
            asked: dict[str, Asked] = {BARE: bare, **clusters}
            await measure(asked, 2, chance, _nothing())
            before = {name: await reads(one.run.redis_url) for name, one in running.items()}
            found = _nothing()
            try:
                await measure(asked, args.rounds, chance, found, handed_over=args.handed_over)
            finally:
                report(found, list(asked))
            for name, one in running.items():
                count = (await reads(one.run.redis_url))[0] - before[name][0]
                print(f"\n{name}: {count} of {args.rounds} prompts of 512 were handed over")
                await clusters[name].ask(_prompt(chance, 512), 2)
                shares = ", ".join(f"{role} {share:.1f}" for role, share in (await idle_shares(one)).items())
                print(f"then, with nothing to do, % of a core: {shares}")
            if args.loads:
                await loads(clusters[OURS], running[OURS], chance)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--beside", help="another checkout, whose cluster takes turns, too")
    parser.add_argument("--worker-flags", default="--speculation off", help="of both workers and the bare engine")
    parser.add_argument("--handed-over", action="store_true", help="measure prompts of 512 tokens alone")
    parser.add_argument("--loads", action="store_true", help="measure 8 streams and 1,500 tokens, too")
    args = parser.parse_args()
    print(provenance.banner("bench.path"), flush=True)
    checkouts = {OURS: ROOT} | ({"beside": Path(args.beside).resolve()} if args.beside else {})
    uvloop.run(run(args, checkouts))


if __name__ == "__main__":
    main()
