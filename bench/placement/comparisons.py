"""Which fleets hold which conversations."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from bench.placement import report, trace
from bench.placement.figures import Figures, figures
from bench.placement.harness import Fleet, Run
from bench.placement.workloads import Agents, Conversation, agents, singles

Hold = Callable[[Fleet, Sequence[Conversation]], Run]
"""Holds conversations with a fleet: of processes, or in virtual time."""
POLICIES = ("cost", "prefix", "least-loaded", "round-robin", "random")
SHAPES = ("long prompts", "long answers", "agents in turns")
DETOURS_MS = (math.inf, 3_000.0, 2_000.0, 1_500.0, 1_250.0, 1_000.0, 700.0, 500.0, 250.0)
NUM_WORKERS = 4
NEVER = 1_000_000_000


def fleet(num_pages: int, prefill_ms: float, decode_ms: float, sequence_ms: float) -> Fleet:
    """Four workers that do both, their times slow enough for two cores: what Python takes is small beside them. Steps
    are short, as they are on a GPU."""
    chunk_tokens = 128
    times = {"prefill-ms-per-token": prefill_ms, "decode-ms": decode_ms, "decode-ms-per-sequence": sequence_ms}
    worker_flags = " ".join([f"--sim-{name} {ms}" for name, ms in times.items()])
    return Fleet(
        num_decode=NUM_WORKERS,
        num_pages=num_pages,
        router_flags=f"--chunk-tokens {chunk_tokens}",
        worker_flags=f"{worker_flags} --max-step-tokens {chunk_tokens}",
    )


# Prefixes of all conversations together do not fit into one worker's pool.
AGENTS = fleet(num_pages=1_024, prefill_ms=1.5, decode_ms=20, sequence_ms=1)
TRACE = fleet(num_pages=5_120, prefill_ms=0.6, decode_ms=10, sequence_ms=0.5)
# A step of a GPU hardly takes longer for one sequence more, else half of the workers could not decode for all.
SPLIT = fleet(num_pages=4_096, prefill_ms=0.6, decode_ms=20, sequence_ms=0.1)


def compare(
    hold: Hold, title: str, fleets: Iterable[tuple[str, Fleet]], conversations: Sequence[Conversation], out: Path
) -> dict[str, Figures]:
    """Run each fleet, print what it did as soon as it is known, and plot them all."""
    rows: dict[str, Figures] = {}
    print(f"\n## {title}: {len(conversations)} conversations", flush=True)
    for name, fleet in fleets:
        rows[name] = figures(hold(fleet, conversations), fleet.total_pages)
        print(report.table({name: rows[name]}).splitlines()[2], flush=True)
    print(report.table(rows), flush=True)
    report.plot(rows, title, out / f"{title.replace(' ', '-').replace(',', '')}.png")
    return rows


def with_policies(names: Sequence[str], fleet: Fleet) -> Iterator[tuple[str, Fleet]]:
    """Workers that all do both, under one policy after the other. To pull a prefix from a peer is a decision of the
    cost: the rivals never do, unless their name ends in `+pull`."""
    for name in names:
        policy, _, pulls = name.partition("+")
        flags = f"{fleet.router_flags} --policy {policy}"
        if policy != "cost" and not pulls:
            flags += f" --min-pull-tokens {NEVER}"
        yield name, replace(fleet, router_flags=flags)


def with_routers(counts: Sequence[int]) -> Iterator[tuple[str, Fleet]]:
    """The same, by cost, with more and more routers."""
    for count in counts:
        yield f"{count} routers" if count > 1 else "1 router", replace(AGENTS, num_routers=count)


def with_splits() -> Iterator[tuple[str, Fleet]]:
    """The same number of workers: none of them for prefill alone; half of them, always used; half, used by cost."""
    yield "aggregated", SPLIT
    half = replace(SPLIT, num_prefill=NUM_WORKERS // 2, num_decode=NUM_WORKERS // 2)
    always = f"{SPLIT.router_flags} --local-prefill-max-tokens 0 --remote-prefill-min-tokens 1"
    yield "always", replace(half, router_flags=always)
    yield "conditional", half


def with_detours(limits_ms: Sequence[float]) -> Iterator[tuple[str, Fleet]]:
    """Aggregated, always disaggregated, by cost, and by cost with all of a stall's time counted and shorter and shorter
    detours: a request would rather wait for the placement that stalls nobody."""
    fleets = dict(with_splits())
    yield from fleets.items()
    for limit_ms in limits_ms:
        flags = f"{SPLIT.router_flags} --stall-weight 1 --max-detour-ms {limit_ms:g}"
        yield f"up to {limit_ms:g} ms", replace(fleets["conditional"], router_flags=flags)


def on_agents(rate: float, duration_s: float, seed: int) -> list[Conversation]:
    """Conversations of agents."""
    return agents(Agents(rate=rate, duration_s=duration_s, seed=seed))


def on_trace(path: Path, divide: int, speed: float, duration_s: float) -> list[Conversation]:
    """Requests of the trace in a file."""
    with path.open() as lines:
        return trace.load(lines, divide, speed, duration_s)


def shapes(duration_s: float, seed: int) -> dict[str, list[Conversation]]:
    """Long prompts with short answers, short ones with long answers, and agents."""
    return {
        "long prompts": singles(1.6, duration_s, 2048, 16, seed),
        "long answers": singles(5.0, duration_s, 128, 96, seed),
        "agents in turns": on_agents(2.0, duration_s, seed),
    }
