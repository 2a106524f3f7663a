"""Confidence intervals by the bootstrap (Efron 1979): the same units drawn again, with replacement, many times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_RESAMPLES = 2_000
LEVEL = 0.95
Values = npt.NDArray[np.float64]
# Of the means [.., k] of columns, each.
Figure = Callable[[Values], Values]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure, and between which figures it lies with 95 % confidence."""

    value: float
    low: float
    high: float


def bootstrap(units: Sequence[Values], figure: Figure, seed: int) -> Interval:
    """Of a figure of several measurements. A unit is what was measured as one, float64 [n, k] of any n: tokens of one
    text hang together, so texts are drawn and not tokens. `figure` takes the means [.., k] over all rows of the drawn
    units; these are of sums over units, as adding up all rows anew takes each resample as long as there are rows.

    Equal seeds give equal intervals. Raises ValueError for no units.
    """
    if not units:
        raise ValueError("an interval needs something that was measured")
    draw = np.random.default_rng(seed).integers(len(units), size=(NUM_RESAMPLES, len(units)))
    sums, sizes = np.array([unit.sum(axis=0) for unit in units]), np.array([len(unit) for unit in units])
    figures = figure(sums[draw].sum(axis=1) / sizes[draw].sum(axis=1)[:, None])
    low, high = np.quantile(figures, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(figure(sums.sum(axis=0) / sizes.sum())), float(low), float(high))


def mean(column: int) -> Figure:
    """The mean of a column."""
    return lambda means: means[..., column]
