"""Figures of a run."""

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.placement.harness import Run, Sample
from bench.placement.oracle import hit_rate
from bench.serve.measures import spread, tpot_ms, ttft_ms

WINDOW_S = 30.0
PAGE_SIZE = 16


@dataclass(frozen=True, slots=True)
class Figures:
    """Times in ms. `imbalance`: the busiest worker's load over the mean, in the worst 30 s; None if it was shorter."""

    num_requests: int
    num_failed: int
    hit_rate: float
    oracle_hit_rate: float
    ttft_p50: float
    ttft_p90: float
    tpot_p90: float
    imbalance: float | None
    mean_load: float
    faults: tuple[str, ...]


def figures(run: Run, total_pages: int) -> Figures:
    """Of requests that succeeded; the oracle's hit rate is for the very requests of this run."""
    good = [one for one in run.sent if one.answer.fault is None]
    first = spread([ttft_ms(one.answer) for one in good]) or {}
    each = spread([tpot_ms(one.answer) for one in good if one.answer.num_tokens > 1]) or {}
    faults = Counter(one.answer.fault for one in run.sent if one.answer.fault)
    num_prompt = sum(one.answer.num_input for one in good)
    return Figures(
        num_requests=len(run.sent),
        num_failed=len(run.sent) - len(good),
        hit_rate=sum(one.answer.num_cached for one in good) / max(1, num_prompt),
        oracle_hit_rate=hit_rate([(one.tenant, one.prompt, one.output) for one in good], PAGE_SIZE, total_pages),
        ttft_p50=first.get("p50", 0.0),
        ttft_p90=first.get("p90", 0.0),
        tpot_p90=each.get("p90", 0.0),
        imbalance=imbalance(run.samples),
        mean_load=statistics.fmean([sum(s.num_sequences.values()) / len(s.num_sequences) for s in run.samples]),
        faults=tuple(f"{count}x {fault}" for fault, count in faults.most_common(3)),
    )


def imbalance(samples: Sequence[Sample], window_s: float = WINDOW_S) -> float | None:
    """The busiest worker's mean load over all workers' mean load, in the window where this is highest."""
    worst = None
    for begin in samples:
        inside = [sample for sample in samples if 0 <= sample.at_s - begin.at_s <= window_s]
        if samples[-1].at_s - begin.at_s < window_s:
            break
        sums: Counter[str] = Counter()
        for sample in inside:
            sums.update(sample.num_sequences)
        if mean := statistics.fmean(sums.values()):
            worst = max(worst or 0.0, max(sums.values()) / mean)
    return worst
