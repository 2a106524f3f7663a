"""What choosing a token costs, and how often two similar distributions choose the same one.

    python -m bench.sampling [--draws 1000]

Logits are random: normal, with a deviation of 6. For a draft's distribution more normal noise is added to the model's.
On a GPU, where there is one, choices are queued behind a wait, so that its time is its own; the host's is what it takes
to queue them.
"""

import argparse
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from bench import provenance
from shared.engine.api import BatchItem, SamplingParams
from shared.engine.kernels import cuda_choice
from shared.engine.sampling.batched import BatchedSampler
from shared.engine.sampling.sampler import Sampler
from shared.models.store import default_cache

DEVIATION = 6.0
VOCABULARIES = {"SmolLM2": 49_152, "GLM-5.2": 154_880}
WAYS = {
    "greedy": SamplingParams(),
    "temperature 1": SamplingParams(temperature=1.0),
    "temperature 0.6": SamplingParams(temperature=0.6),
    "top_p 0.95": SamplingParams(temperature=1.0, top_p=0.95),
    "top_k 50": SamplingParams(temperature=1.0, top_k=50),
    "min_p 0.05": SamplingParams(temperature=1.0, min_p=0.05),
}
ALL_CUTS = SamplingParams(temperature=1.0, top_p=0.95, top_k=50, min_p=0.01)
GPU_ROWS, GPU_VOCABULARIES = (1, 8, 64), {"Llama 3": 128_256, "GLM-5.2": 154_880}
GPU_DEVIATIONS = (DEVIATION, 1.0)  # of the second most of the vocabulary is in the nucleus
NUM_QUEUED, HEAD_START_CYCLES = 8, 40_000_000
NUM_PAIRS, NOISES = 12, (0.1, 0.3, 0.6, 1.0)


def items(params: SamplingParams, count: int) -> Iterator[BatchItem]:
    """Choices at one position after another."""
    for position in range(count):
        yield BatchItem("r", (0,), position, (0,), True, replace(params, seed=7), 0)


def cost_us(vocab: int, params: SamplingParams, count: int) -> tuple[float, float]:
    """Median and best time of a choice, rows one by one."""
    rows = torch.randn(8, vocab, generator=torch.Generator().manual_seed(0)) * DEVIATION
    sampler, times = Sampler(vocab, ()), []
    for index, item in enumerate(items(params, count)):
        started = time.perf_counter()
        sampler(rows[index % len(rows), None], [item])
        times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times), min(times)


def batch_us(kind: type[Sampler], vocab: int, params: SamplingParams, count: int) -> tuple[float, float]:
    """Median and best time of 8 choices in one call."""
    rows = torch.randn(8, vocab, generator=torch.Generator().manual_seed(0)) * DEVIATION
    sampler, asked, times = kind(vocab, ()), list(items(params, 8)), []
    for _ in range(count):
        started = time.perf_counter()
        sampler(rows, asked)
        times.append((time.perf_counter() - started) * 1e6)
    return statistics.median(times), min(times)


def on_gpu_us(sampler: BatchedSampler, rows: torch.Tensor, params: SamplingParams) -> tuple[float, float]:
    """What a choice for all rows takes the GPU, and the host to launch."""
    asked, times = list(items(params, len(rows))), []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        started = time.perf_counter()
        for _ in range(NUM_QUEUED):
            sampler.launch(rows, asked)
        host_us = (time.perf_counter() - started) * 1e6
        end.record()
        in_time = not start.query()
        end.synchronize()
        gpu_us = start.elapsed_time(end) * 1e3 if in_time else math.nan
        times.append((gpu_us / NUM_QUEUED, host_us / NUM_QUEUED))
    gpu, host = (statistics.median(each) for each in zip(*times[1:], strict=True))
    return gpu, host


def print_gpu() -> None:
    device, ways = torch.device("cuda", 0), WAYS | {"all cuts": ALL_CUTS}
    print(f"\n{torch.cuda.get_device_name(device)}, us of the GPU (of the host)\n")
    print("| | " + " | ".join(ways) + " |\n|" + "---|" * (1 + len(ways)))
    for name, vocab in GPU_VOCABULARIES.items():
        kernel = cuda_choice.find(device, default_cache() / "kernels", vocab)
        for count in GPU_ROWS:
            for deviation in GPU_DEVIATIONS:
                rows = torch.randn(count, vocab, device=device) * deviation
                for label, each in (("torch", None), ("one launch", kernel)):
                    costs = [on_gpu_us(BatchedSampler(vocab, (), each), rows, params) for params in ways.values()]
                    cells = " | ".join(f"{gpu:.0f} ({host:.0f})" for gpu, host in costs)
                    print(f"| {name}, {count} rows, deviation {deviation:g}, {label} | {cells} |", flush=True)


def softmax(row: Any) -> Any:
    likely = np.exp(row - row.max())
    return likely / likely.sum()


def agreements(vocab: int, noise: float, num_draws: int) -> tuple[float, float, float]:
    """Of pairs of distributions: what rejection sampling accepts (1 - TV), how often the sampler chooses the same, and
    how often one uniform number does, looked up in both cumulative distributions."""
    chance, sampler, found = np.random.default_rng(1), Sampler(vocab, ()), []
    asked = list(items(WAYS["temperature 1"], num_draws))
    for _ in range(NUM_PAIRS):
        model = chance.normal(scale=DEVIATION, size=vocab)
        pair = (model, model + chance.normal(scale=noise, size=vocab))
        p, q = map(softmax, pair)
        chosen = [sampler(torch.tensor(row)[None].float().expand(num_draws, -1), asked) for row in pair]
        same = sum(one == other for one, other in zip(*chosen, strict=True)) / num_draws
        looked_up = [np.searchsorted(each.cumsum(), np.random.default_rng(2).random(num_draws)) for each in (p, q)]
        found.append((np.minimum(p, q).sum(), same, np.mean(looked_up[0] == looked_up[1])))
    rejection, same, inversion = np.mean(found, axis=0)
    return float(rejection), float(same), float(inversion)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--only-gpu", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(provenance.banner("bench.sampling"))
    if torch.cuda.is_available():
        print_gpu()
    if not args.only_gpu:
        print_cpu(args.draws)


def print_cpu(num_draws: int) -> None:
    print("| us a choice, median (best) | " + " | ".join(WAYS) + " |\n|" + "---|" * (1 + len(WAYS)))
    for name, vocab in VOCABULARIES.items():
        costs = [cost_us(vocab, params, num_draws // 5) for params in WAYS.values()]
        cells = [f"{middle:.0f} ({best:.0f})" for middle, best in costs]
        print(f"| {name}, {vocab:,} tokens | {' | '.join(cells)} |", flush=True)
    print("\n| us for 8 rows | " + " | ".join(WAYS) + " |\n|" + "---|" * (1 + len(WAYS)))
    for label, kind in (("row by row", Sampler), ("together, as on a GPU", BatchedSampler)):
        costs = [batch_us(kind, VOCABULARIES["SmolLM2"], params, num_draws // 50) for params in WAYS.values()]
        print(f"| {label} | {' | '.join(f'{middle:.0f} ({best:.0f})' for middle, best in costs)} |", flush=True)
    error = math.sqrt(0.25 / num_draws / NUM_PAIRS)
    print(f"\n| noise | 1 - TV | same token (± {error:.3f}) | by inversion |\n|---|---|---|---|")
    for noise in NOISES:
        print(f"| {noise} | " + " | ".join(f"{share:.3f}" for share in agreements(49_152, noise, num_draws)) + " |")


if __name__ == "__main__":
    main()
