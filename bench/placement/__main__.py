"""Placement under load, with real processes: how much is found cached, how long it takes, and what it costs.

    python -m bench.placement agents                policies compared, on conversations of agents
    python -m bench.placement trace --trace FILE    the same on the conversation trace published with Mooncake
    python -m bench.placement bound --trace FILE    what is left of its times if nobody computes what the oracle finds
    python -m bench.placement splits                aggregated, always disaggregated, by cost: three shapes of load
    python -m bench.placement frontier              what of TTFT and TPOT an operator may choose by --max-detour-ms
    python -m bench.placement routers               1, 2 and 4 routers
    python -m bench.placement streams               a real model: running streams while long prompts arrive
    python -m bench.placement path                  CPU and added time of gateway and router

On GPUs: streams --gpus 2 --model DIR --streams 16 --stream-tokens 2000 --long-tokens 8192 --long-output 256 16
--every-s 0.3 --worker-flags "--speculation off --max-step-tokens 2048 --kv-cache-mb 48000", a model with random weights
being what `python -m bench.random_checkpoint` makes.

The first six use the sim engine on four workers, 60 s or so each time; prompts, answers and times come from --seed.
With --virtual they take two seconds and give the same numbers each time: policy, scheduler and pages are the real ones,
what processes and calls between them take is a constant (bench/placement/virtual).
The oracle's hit rate is that of one cache as large as all workers' together, which knows the future.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from bench import provenance
from bench.placement import comparisons, harness, path, report, streams
from bench.placement.figures import PAGE_SIZE
from bench.placement.oracle import relieved
from bench.placement.virtual import cluster

VIRTUAL = ("agents", "trace", "bound", "splits", "frontier", "routers")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser("python -m bench.placement", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("what", choices=(*VIRTUAL, "streams", "path"))
    made.add_argument("--trace", type=Path, help="JSONL: timestamp, input_length, output_length, hash_ids")
    made.add_argument("--divide", type=int, default=32, help="lengths of the trace are divided by this")
    made.add_argument("--speed", type=float, default=6.0, help="the trace runs so many times as fast")
    made.add_argument("--shapes", nargs="+", default=comparisons.SHAPES, help="of splits and frontier")
    made.add_argument("--detours-ms", nargs="+", type=float, default=comparisons.DETOURS_MS, help="of frontier")
    made.add_argument("--policies", nargs="+", default=comparisons.POLICIES, help="those to compare")
    made.add_argument("--routers", nargs="+", type=int, default=[1, 2, 4], help="numbers of routers")
    made.add_argument("--rate", type=float, default=3.0, help="conversations of agents that begin per second")
    made.add_argument("--duration-s", type=float, default=60.0, help="time in which conversations begin")
    made.add_argument("--requests", type=int, default=1000, help="of path, at each number of streams")
    made.add_argument("--concurrency", nargs="+", type=int, default=[16, 64, 256], help="streams of path")
    made.add_argument("--virtual", action="store_true", help="no processes: the first six in virtual time")
    shape, fleet = streams.Load(), streams.Fleet()
    made.add_argument("--gpus", type=int, default=0, help="of streams: workers get GPUs instead of cores")
    made.add_argument("--model", default="", help="of streams: a directory, or a name; by default the default model")
    made.add_argument("--fleets", nargs="+", default=streams.DEFAULT_FLEETS, choices=streams.FLEETS, help="of streams")
    made.add_argument("--explain", action="store_true", help="of streams: what routers believe, every other second")
    made.add_argument("--streams", type=int, default=shape.num_streams, help="that run all the time")
    made.add_argument("--stream-tokens", type=int, default=shape.stream_tokens, help="length of each stream")
    made.add_argument("--long-tokens", type=int, default=shape.long_tokens, help="length of a long prompt")
    made.add_argument("--long-output", nargs="+", type=int, default=[shape.long_output], help="and of its answer")
    made.add_argument("--every-s", nargs="+", type=float, default=[shape.every_s], help="time between two long prompts")
    made.add_argument("--warm-s", type=float, default=shape.warm_s, help="time of the same load that is not measured")
    made.add_argument("--worker-flags", default=fleet.worker_flags, help="of streams")
    made.add_argument("--router-flags", default=fleet.router_flags, help="of streams")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, default=Path("build/placement"), help="folder for plots")
    return made


def loads(options: argparse.Namespace) -> Iterator[streams.Load]:
    """Of streams: one for each length of answers to long prompts and each time between them."""
    for long_output, every_s in product(options.long_output, options.every_s):
        yield streams.Load(
            options.streams, options.stream_tokens, options.long_tokens, long_output, every_s,
            options.duration_s, options.warm_s, options.seed,
        )  # fmt: skip


def main() -> None:
    made = parser()
    options = made.parse_args()
    if options.virtual and options.what not in VIRTUAL:
        made.error(f"in virtual time there are only {', '.join(VIRTUAL)}")
    print(provenance.banner("bench.placement"), flush=True)
    hold = cluster.run if options.virtual else harness.run
    duration_s, seed, out = options.duration_s, options.seed, options.out
    match options.what:
        case "agents":
            load = comparisons.on_agents(options.rate, duration_s, seed)
            comparisons.compare(
                hold, "agents", comparisons.with_policies(options.policies, comparisons.AGENTS), load, out
            )
        case "trace" | "bound" as what:
            if options.trace is None:
                made.error(f"{what} needs --trace FILE")
            load = comparisons.on_trace(options.trace, options.divide, options.speed, duration_s)
            comparisons.compare(
                hold, "trace", comparisons.with_policies(options.policies, comparisons.TRACE), load, out
            )
            if what == "bound":
                rest = relieved(load, PAGE_SIZE, comparisons.TRACE.total_pages)
                comparisons.compare(hold, "trace without the oracle's hits", [("cost", comparisons.TRACE)], rest, out)
        case "routers":
            load = comparisons.on_agents(options.rate, duration_s, seed)
            comparisons.compare(hold, "routers", comparisons.with_routers(options.routers), load, out)
        case "splits":
            shapes = comparisons.shapes(duration_s, seed)
            for name, load in [(name, shapes[name]) for name in options.shapes]:
                comparisons.compare(hold, name, comparisons.with_splits(), load, out)
        case "frontier":
            shapes = comparisons.shapes(duration_s, seed)
            for name in options.shapes:
                fleets = comparisons.with_detours(options.detours_ms)
                rows = comparisons.compare(hold, name, fleets, shapes[name], out)
                report.plot_frontier(rows, name, out / f"frontier-{name.replace(' ', '-')}.png")
        case "streams":
            fleet = streams.Fleet(options.model, options.gpus, options.worker_flags, options.router_flags)
            streams.measure(fleet, list(loads(options)), options.fleets, options.explain)
        case _:
            path.measure(options.requests, options.concurrency, seed)


if __name__ == "__main__":
    main()
