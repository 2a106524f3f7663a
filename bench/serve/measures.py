"""Figures from answers."""

import statistics
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from bench.serve.client import Answer
from bench.serve.load import Run

PERCENTILES = (50, 90, 99)


def figures(run: Run) -> dict[str, Any]:
    """Latencies in ms (of requests that succeeded), rates per second of the whole run, and what failed."""
    good = [answer for answer in run.answers if answer.fault is None]
    num_output = sum(answer.num_tokens for answer in good)
    return {
        "num_requests": len(run.answers),
        "num_failed": len(run.answers) - len(good),
        "faults": dict(Counter(answer.fault for answer in run.answers if answer.fault is not None).most_common(5)),
        "wall_s": round(run.wall_s, 3),
        "num_input_tokens": sum(answer.num_input for answer in good),
        "num_cached_tokens": sum(answer.num_cached for answer in good),
        "num_output_tokens": num_output,
        "requests_per_s": round(len(good) / run.wall_s, 3),
        "output_tokens_per_s": round(num_output / run.wall_s, 2),
        "ttft_ms": spread([ttft_ms(answer) for answer in good]),
        "tpot_ms": spread([tpot_ms(answer) for answer in good if answer.num_tokens > 1]),
        "itl_ms": spread([gap for answer in good for gap in gaps_ms(answer)]),
        "e2e_ms": spread([(answer.arrivals[-1][0] - answer.sent_s) * 1e3 for answer in good]),
    }


def ttft_ms(answer: Answer) -> float:
    """Time to first token."""
    return (answer.arrivals[0][0] - answer.sent_s) * 1e3


def tpot_ms(answer: Answer) -> float:
    """Time per output token after those of the first arrival; 0 if all came at once."""
    (first_s, first_count), (last_s, _) = answer.arrivals[0], answer.arrivals[-1]
    rest = answer.num_tokens - first_count
    return (last_s - first_s) * 1e3 / rest if rest else 0.0


def gaps_ms(answer: Answer) -> list[float]:
    """Times between arrivals (of one token each, if the server does not bundle them)."""
    return [(later - earlier) * 1e3 for (earlier, _), (later, _) in pairwise(answer.arrivals)]


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles, linear between neighbours; None of nothing."""
    if not values:
        return None
    cuts = statistics.quantiles(values, n=100, method="inclusive") if len(values) > 1 else [values[0]] * 99
    found = {"mean": statistics.fmean(values)} | {f"p{share}": cuts[share - 1] for share in PERCENTILES}
    return {name: round(value, 3) for name, value in found.items()}
