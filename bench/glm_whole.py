"""GLM-5.2 at its full size on the GPUs of one host: what a user gets, sums over ranks and the host's work included.

    python -m bench.glm_whole [--ranks 4] [--layers 78] [--linears bf16|fp8] [--prompts 1024 4096] [--between]

A process a GPU; the first plans, and tells the others each step, as the ranks of a worker do. Weights are random, made
on the devices, and what every rank has is the same on all (see `bench.glm_random`). First the graphs of steps alone, by
events around replays in a row, on which all ranks meet before. Then what a user gets: steps of a whole engine, without
drafts and with three of the model's own layer, launched ahead, and what of them the GPU takes if it need not wait for
the host; and the first tokens of prompts that nobody has asked before. `--between` says what lies between the replays
of the model's graph on the first rank. Random drafts are hardly ever right: tokens a second are given for the accepted
length that docs/LOG.md has.
"""

import argparse
import gc
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch

from bench import between, glm_gaps, glm_rank, provenance, replays
from bench.glm_random import FIELDS, NAMES, PAGE_SIZE, Rank, rank
from bench.glm_rank import MEAN_ACCEPTED
from shared.engine.api import BatchItem, EngineRequest, Executor, SamplingParams, TokensSampled
from shared.engine.engine import Engine
from shared.engine.executor import TorchExecutor
from shared.engine.kv.store import KvStore
from shared.engine.models.glm_config import parse
from shared.engine.parallel.distributed import DistributedGroup, host_store, join_store
from shared.engine.parallel.executor import ParallelExecutor

KV_TOKENS = 40_000
CONTEXT, NUM_DRAFTS, NUM_STEPS = 8192, 3, 60
STEPS = (
    (1, 1, 1024), (1, 1, CONTEXT), (1, 1, CONTEXT + 1), (1, 2, CONTEXT), (1, 4, CONTEXT), (1, 4, CONTEXT + 4),
    (8, 1, 1024),
)  # fmt: skip
SAMPLINGS = {"greedy": SamplingParams(), "temperature 1": SamplingParams(temperature=1.0)}
REPLAYS, REPEATS, NUM_TRACED = 30, 5, 16
PATIENCE_S = 120.0


@dataclass(frozen=True, slots=True)
class Told:
    """Satisfies `parallel.executor.Follower` by a pipe to a process, for its executor that drafts or the other one."""

    process: BaseProcess
    steps: Connection
    drafting: bool

    def follow(self, batch: Sequence[BatchItem]) -> None:
        """See `Follower.follow`."""
        self.steps.send((self.drafting, list(batch)))

    def is_gone(self) -> bool:
        """See `Follower.is_gone`."""
        return self.process.exitcode is not None


def made_rank(number: int, port: int, args: argparse.Namespace) -> Rank[DistributedGroup]:
    """The rank of this number, on the GPU of this number."""
    torch.cuda.set_device(number)
    group = DistributedGroup(join_store(port, PATIENCE_S), number, args.ranks, PATIENCE_S)
    config = parse(FIELDS)
    config = replace(
        config, num_layers=args.layers, full_layers=config.full_layers[: args.layers],
        moe_layers=config.moe_layers[: args.layers],
    )  # fmt: skip
    device = torch.device("cuda", number)
    made = rank(config, group, device, pdl=True, cuda=True, fp8=args.linears == "fp8", kv_tokens=KV_TOKENS)
    torch.cuda.synchronize()
    return made


def graph_ms(made: Rank[DistributedGroup]) -> dict[glm_rank.Step, tuple[float, ...]]:
    """The times of each kind of step. All ranks call this together."""
    found = dict[glm_rank.Step, tuple[float, ...]]()
    for size, width, context in STEPS:
        made.decoder(glm_rank.batch(size, width, context), made.memory.bytes, made.layout, NAMES)
        times = replays.timed(made.decoder.graph(size, width, context).graph, REPLAYS, REPEATS)
        found[size, width, context] = statistics.median(times), min(times), max(times)
    return found


def follow(number: int, port: int, args: argparse.Namespace, steps: Connection) -> None:
    """Be a rank but the first, until the pipe closes."""
    try:
        with torch.inference_mode():
            made = made_rank(number, port, args)
            executors = on_rank(made)
            graph_ms(made)
        gc.freeze()
        while True:
            drafting, batch = steps.recv()
            executors[drafting].launch(batch)
    except EOFError:
        os._exit(0)  # without NCCL's good-bye
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def on_rank(made: Rank[DistributedGroup]) -> dict[bool, TorchExecutor]:
    """Its executors: the one with the layer that drafts, and the one without."""
    vocab_size = len(made.decoder.ends.head) * made.group.num_ranks
    return {drafting: glm_gaps.on_rank(made, vocab_size, drafting=drafting) for drafting in (False, True)}


def first_token_s(executor: Executor, num_tokens: int, seed: int) -> float:
    """Until the first token of a prompt, alone."""
    kv = KvStore(executor.spec.num_pages, PAGE_SIZE, 10_000)
    engine = Engine(executor, kv, max_step_tokens=8192, max_num_sequences=1)
    prompt = tuple((seed + 31 * place) % 100_000 + 3 for place in range(num_tokens))
    started = time.perf_counter()
    engine.submit(EngineRequest("prompt", prompt, SamplingParams(max_tokens=1, ignore_eos=True)))
    while not any(isinstance(event, TokensSampled) for event in engine.step()):
        pass
    return time.perf_counter() - started


def report(executors: dict[bool, ParallelExecutor], prompts: Sequence[int]) -> None:
    """Print what a user gets of an engine."""
    print(f"\n| a user at {CONTEXT:,} tokens | ms on the GPU | ms a step | tokens a step, as it was | tokens/s |")
    print("|---|---|---|---|---|")
    for name, sampling in SAMPLINGS.items():
        for num_drafts in (0, NUM_DRAFTS):
            executor = executors[num_drafts > 0]
            busy = glm_gaps.gpu_ms(executor, 1, CONTEXT, num_drafts, sampling)
            ms, _, tokens = glm_gaps.wall_ms(executor, 1, CONTEXT, num_drafts, sampling, NUM_STEPS)
            accepted = MEAN_ACCEPTED[1 + num_drafts] if num_drafts else 1.0
            rate = f"{accepted / ms * 1000:.0f} at {accepted:g} a step"
            print(f"| {name}, {num_drafts} drafts | {busy:.2f} | {ms:.2f} | {tokens:.2f} | {rate} |", flush=True)
    print("\n| a prompt of | first token, ms |\n|---|---|")
    for num_tokens in prompts:
        times = [1000 * first_token_s(executors[True], num_tokens, seed) for seed in range(4)][1:]
        print(f"| {num_tokens:,} | {statistics.median(times):.1f} ({min(times):.1f} to {max(times):.1f}) |", flush=True)


def tell_gaps(executors: dict[bool, ParallelExecutor]) -> None:
    """Print what lies between replays."""
    for name, sampling in SAMPLINGS.items():
        for num_drafts in (0, NUM_DRAFTS):
            with glm_gaps.begun(executors[num_drafts > 0], 1, CONTEXT, num_drafts, sampling, NUM_TRACED) as engine:
                found = between.traced(lambda: [engine.step() for _ in range(NUM_TRACED)])
            between.report(f"{name}, {num_drafts} drafts", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layers", type=int, default=78)
    parser.add_argument("--linears", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--prompts", type=int, nargs="*", default=[1024, 4096])
    parser.add_argument("--between", action="store_true")
    args = parser.parse_args()
    print(provenance.banner("bench.glm_whole"))
    print(f"{args.layers} layers, attention's linears, and dense MLPs', in {args.linears}", flush=True)
    store, context, others = (
        host_store(PATIENCE_S),
        multiprocessing.get_context("spawn"),
        dict[BaseProcess, Connection](),
    )
    for number in range(1, args.ranks):
        theirs, ours = context.Pipe(duplex=False)
        process = context.Process(target=follow, args=(number, store.port, args, theirs), daemon=True)
        process.start()
        theirs.close()
        others[process] = ours
    with torch.inference_mode():
        made = made_rank(0, store.port, args)
        own = on_rank(made)
        gigabytes = torch.cuda.memory_allocated() / 1e9
        print(f"{args.ranks} x {torch.cuda.get_device_name(0)}, {gigabytes:.1f} GB each", flush=True)
        print("\n| batch, tokens each, context | ms (spread) |\n|---|---|")
        for (size, width, at), (median, least, most) in graph_ms(made).items():
            print(f"| {size}, {width}, {at:,} | {median:.3f} ({least:.3f} to {most:.3f}) |", flush=True)
        print(f"sums go {'through the memory of peers' if made.group.by_peers else 'by NCCL alone'}", flush=True)
    gc.freeze()  # as a worker does: a full collection takes as long as some steps
    executors = {
        drafting: ParallelExecutor(each, [Told(*other, drafting) for other in others.items()], PATIENCE_S)
        for drafting, each in own.items()
    }
    report(executors, args.prompts)
    if args.between:
        tell_gaps(executors)
    for steps in others.values():
        steps.close()
    for other in others:
        other.join()
    os._exit(0)  # without NCCL's good-bye


if __name__ == "__main__":
    main()
