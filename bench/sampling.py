"""What choosing a token costs, and how often two similar distributions choose the same one.

    python -m bench.sampling [--draws 1000]

Logits are random: normal, with a deviation of 6. For a draft's distribution more normal noise is added to the model's.
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
from shared.engine.sampling.batched import BatchedSampler
from shared.engine.sampling.sampler import Sampler

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
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(provenance.banner("bench.sampling"))
    print("| us a choice, median (best) | " + " | ".join(WAYS) + " |\n|" + "---|" * (1 + len(WAYS)))
    for name, vocab in VOCABULARIES.items():
        costs = [cost_us(vocab, params, args.draws // 5) for params in WAYS.values()]
        cells = [f"{middle:.0f} ({best:.0f})" for middle, best in costs]
        print(f"| {name}, {vocab:,} tokens | {' | '.join(cells)} |", flush=True)
    print("\n| us for 8 rows | " + " | ".join(WAYS) + " |\n|" + "---|" * (1 + len(WAYS)))
    for label, kind in (("row by row", Sampler), ("together, as on a GPU", BatchedSampler)):
        costs = [batch_us(kind, VOCABULARIES["SmolLM2"], params, args.draws // 50) for params in WAYS.values()]
        print(f"| {label} | {' | '.join(f'{middle:.0f} ({best:.0f})' for middle, best in costs)} |", flush=True)
    error = math.sqrt(0.25 / args.draws / NUM_PAIRS)
    print(f"\n| noise | 1 - TV | same token (± {error:.3f}) | by inversion |\n|---|---|---|---|")
    for noise in NOISES:
        print(f"| {noise} | " + " | ".join(f"{share:.3f}" for share in agreements(49_152, noise, args.draws)) + " |")


if __name__ == "__main__":
    main()
