"""Two or more ways of doing the same thing, in turns within one run: what one takes more than another.

Other work on a machine comes and goes by the second, and moves the medians of two runs, one after the other, by more
than the difference that is looked for. Two measurements of the same thing within a second meet nearly the same machine,
so their difference says more than either; its median over many such pairs leaves out those that something came between.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from statistics import median

import numpy as np

NUM_RESAMPLES = 4_000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Difference:
    """A median of paired differences, and the interval that holds the true one with a probability of 95 %."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return format(self, "+.1f")

    def __format__(self, spec: str) -> str:
        """Each of the three numbers in the format given."""
        middle, low, high = (format(number, spec or "+.1f") for number in (self.median, self.low, self.high))
        return f"{middle} ({low} to {high})"


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """How much more the second way takes than the first, pair by pair.

    The interval is of the percentile bootstrap (Efron and Tibshirani, 1993, section 13.3): pairs are drawn again and
    again, with replacement, as many as there are. Raises ValueError for sequences of different lengths, or empty ones.
    """
    paired = [theirs - ours for ours, theirs in zip(first, second, strict=True)]
    middle, tail = median(paired), (1 - CONFIDENCE) / 2
    drawn = np.random.default_rng(0).choice(np.array(paired), (NUM_RESAMPLES, len(paired)))
    low, high = np.quantile(np.median(drawn, axis=1), (tail, 1 - tail))
    return Difference(middle, float(low), float(high))


async def in_turns(ways: Mapping[str, Callable[[], Awaitable[None]]], chance: Random) -> None:
    """Go each way once, in an order of chance: what comes first must not be the same every time."""
    for name in chance.sample(list(ways), len(ways)):
        await ways[name]()
