"""What ranks on several GPUs of a host cost and gain: sums over them, and steps of a dense shape on one and on all.

    python -m bench.ranks [--ranks 2] [--shape llama-3.1-8b] [--skip steps]

A process a GPU. Sums are of bfloat16 [tokens, hidden], 64 of them in a CUDA graph, as in a decode step: NCCL's
all-reduce; what a group does by NCCL (gathered, or large ones shared out, and added in the order of ranks); the same
through the memory of the other GPU, of few tokens; and that with the residual and the next norm. Steps are whole steps
of the executor, as in bench.shapes; how the first rank tells the others is not in them.
"""

import argparse
import math
import multiprocessing
import os
import statistics
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroupNCCL, Store  # type: ignore[attr-defined]

from bench import provenance, replays, shapes
from shared.engine.api import SampledToken, SamplingParams
from shared.engine.executor import TorchExecutor
from shared.engine.models.config import parse
from shared.engine.parallel.distributed import DistributedGroup, host_store, join_store
from shared.engine.parallel.group import Group, added, ordered_sum

HIDDEN, TOKENS = (4096, 6144), (1, 4, 8, 32, 64, 1024)
STEPS = ((1, 1024), (8, 1024), (64, 1024), (1, 8192))
SUMS_A_GRAPH, REPLAYS, TIMES = 64, 10, 7
NUM_LOGPROBS = 8
PATIENCE_S = 120.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--shape", default="llama-3.1-8b", choices=sorted(shapes.SHAPES))
    parser.add_argument("--skip", nargs="*", default=[], choices=["sums", "steps"])
    args = parser.parse_args()
    print(provenance.banner("bench.ranks"), flush=True)
    store = host_store(PATIENCE_S)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, store.port, args)) for rank in range(args.ranks)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    raise SystemExit(any(rank.exitcode for rank in ranks))


def _rank(rank: int, port: int, args: argparse.Namespace) -> None:
    """Measure, and end at once: NCCL would say good-bye to peers, one of which may have failed."""
    try:
        _measure(rank, port, args)
        torch.cuda.synchronize()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _measure(rank: int, port: int, args: argparse.Namespace) -> None:
    torch.cuda.set_device(rank)
    store = join_store(port, PATIENCE_S)
    say: Callable[[str], None] = partial(print, flush=True) if rank == 0 else (lambda _line: None)
    say(f"{args.ranks} x {torch.cuda.get_device_name(rank)}")
    if "sums" not in args.skip:
        _sums(rank, args.ranks, store, say)
    if "steps" not in args.skip:
        _steps(rank, args, store, say)


def _sums(rank: int, num_ranks: int, store: Store, say: Callable[[str], None]) -> None:
    """Print the time of each kind of sum, us."""
    nccl: Any = ProcessGroupNCCL(PrefixStore("bench", store), rank, num_ranks, ProcessGroupNCCL.Options())
    apart, together = (_group(rank, num_ranks, store, peers) for peers in (False, True))
    _check(rank, num_ranks, together)
    say(
        "\n| tokens x hidden | KiB | NCCL all-reduce, us | a group's by NCCL | peers' memory | with residual and norm |"
    )
    say("|---|---|---|---|---|---|")
    for hidden in HIDDEN:
        for num_tokens in TOKENS:
            part = torch.randn(num_tokens, hidden, dtype=torch.bfloat16, device="cuda") * 0.01
            stream, gain = torch.zeros_like(part), torch.ones(hidden, dtype=torch.bfloat16, device="cuda")
            whole = part.clone()
            ways: list[Callable[[], object]] = [
                lambda whole=whole: nccl.allreduce([whole]).wait(),  # type: ignore[misc]
                lambda part=part: apart.sum(part),  # type: ignore[misc]
                lambda part=part: together.sum(part),  # type: ignore[misc]
                lambda part=part, stream=stream, gain=gain: together.add(part, stream, gain),  # type: ignore[misc]
            ]
            times = " | ".join(f"{_us(way):.1f}" for way in ways)
            say(f"| {num_tokens} x {hidden} | {part.nbytes / 1024:g} | {times} |")


def _check(rank: int, num_ranks: int, group: DistributedGroup) -> None:
    """Sums are those of their twins. Raises AssertionError."""
    for seed in range(20):
        for num_tokens in TOKENS:
            chance = torch.Generator().manual_seed(seed)
            made = [
                torch.randn(num_tokens, HIDDEN[0], generator=chance).to("cuda", torch.bfloat16)
                for _ in range(num_ranks + 2)
            ]
            *parts, stream, gain = made
            total, twin_stream = ordered_sum(parts), stream.clone()
            assert torch.equal(group.sum(parts[rank]), total)
            begun, squares = added(total, twin_stream, gain[0])
            own_begun, own_squares = group.add(parts[rank], stream, gain[0])
            assert torch.equal(own_begun, begun)
            assert torch.equal(stream, twin_stream)
            torch.testing.assert_close(own_squares.sum(1), squares.sum(1))
    assert group.by_peers, "there is no way into the peers' memory"


def _group(rank: int, num_ranks: int, store: Store, peers: bool) -> DistributedGroup:
    return DistributedGroup(PrefixStore(f"{peers}", store), rank, num_ranks, PATIENCE_S, peers=peers)


def _us(work: Callable[[], object]) -> float:
    """Of one in a graph of many, median of several times."""
    many = partial(_often, work)
    return replays.milliseconds(many, replays=REPLAYS, repeats=TIMES) * 1e3 / SUMS_A_GRAPH


def _often(work: Callable[[], object]) -> None:
    for _ in range(SUMS_A_GRAPH):
        work()


def _steps(rank: int, args: argparse.Namespace, store: Store, say: Callable[[str], None]) -> None:
    """Print the time of decode steps: alone, on all ranks by NCCL, on all ranks through peers' memory; and how many of
    the tokens, each after one of its own, are those of one GPU, and how likely it found the others beside its own."""
    groups: dict[str, Group | None] = {"1 GPU": None} if rank == 0 else {}
    for name, peers in (("by NCCL", False), ("peers' memory", True)):
        groups[f"{args.ranks} GPUs, {name}"] = _group(rank, args.ranks, PrefixStore("steps", store), peers)
    config, device = parse(shapes.SHAPES[args.shape]), torch.device("cuda", rank)
    num_pages = max(size * (context // shapes.PAGE_SIZE + 1) for size, context in STEPS)
    say("\n| ms, median (spread) | " + " | ".join(f"batch {size}, context {at:,}" for size, at in STEPS) + " |")
    say("|---" * (len(STEPS) + 1) + "|")
    twin: dict[tuple[int, int], list[SampledToken]] = {}
    for name, group in groups.items():
        (_, engine), cells = shapes.decoder_and_executor(config, device, num_pages, False, group), []
        for kind in STEPS:
            tokens, times = _step(engine, *kind)
            spread = f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"
            cells.append(f"{spread}; {_agreement(tokens, twin.setdefault(kind, tokens))}")
        say(f"| {name} | {' | '.join(cells)} |")
        del engine
        torch.cuda.empty_cache()


def _step(engine: TorchExecutor, size: int, context: int) -> tuple[list[SampledToken], list[float]]:
    """What is chosen for each sequence, and the times of a step, ms."""
    room = context // shapes.PAGE_SIZE + 1
    items = [
        replace(shapes.item(sequence, context - 1, 1, room), token_ids=[3 + 7 * sequence]) for sequence in range(size)
    ]
    times = [1000 * time for time in shapes.seconds(lambda: engine.forward(items), 50)]
    asked = [replace(item, sampling=SamplingParams(num_logprobs=NUM_LOGPROBS)) for item in items]
    return [each.tokens[0] for each in engine.forward(asked) if each is not None], times


def _agreement(tokens: list[SampledToken], twin: list[SampledToken]) -> str:
    pairs = [(own.token_id, other) for own, other in zip(tokens, twin, strict=True) if own.token_id != other.token_id]
    gaps = [other.top[0][1] - dict(other.top).get(token_id, -math.inf) for token_id, other in pairs]
    same = f"{len(tokens) - len(gaps)} of {len(tokens)}"
    return f"{same}, others within {max(gaps):.3f}" if gaps else same


if __name__ == "__main__":
    main()
