"""A draw that depends on nothing but the distribution, the seed and the position: the Gumbel-max trick.

Each token's log weight gets noise of its own, and the highest sum wins; with noise of the Gumbel distribution that is a
draw from the softmax (Gumbel 1954; Maddison, Tarlow, Minka 2014). The same in terms of rates: each token arrives after
a time with an exponential distribution, its weight being the rate, and the first to arrive wins. A token's noise does
not know the weights, so two distributions that are alike mostly choose the same token (docs/decisions).

The noise of a token is a pure function of integers, for any machine and any order:

    mix(mix(mix(seed) + (position + 1) * GOLDEN) + (token + 1) * GOLDEN)        modulo 2**64, see `splitmix`

that is, the seed's generator yields a start for each position, whose generator yields a number for each token. Where a
position needs noise that is independent of this, for another purpose than to choose the model's token, the seed's word
mix(seed) becomes mix(mix(seed) ^ purpose).
"""

import math

import numpy as np
from numpy.typing import NDArray

from shared.engine.splitmix import GOLDEN, Words, mix, mix_words

Weights = NDArray[np.float32]
Floats = NDArray[np.float64]
Ids = NDArray[np.int64]

# Of a word the upper bits count, as (bits + 1/2) / 2**52: inside (0, 1), and exact in float64.
UNUSED_BITS = 12
UNIT = 2.0**-52
LEAST_NOISE = UNIT / 2
# What is compared in float32 passes if it may be within the rounding.
SLACK = 1 + 1e-6
# So few tokens are not worth a first look.
FEW = 64
# Tokens that are looked at together: what is computed of them stays in the processor's cache.
BLOCK = 16_384
STEPS: Words = np.arange(1, BLOCK + 1, dtype=np.uint64) * np.uint64(GOLDEN)


def start(seed: int, position: int, purpose: int = 0) -> int:
    """Where a position's noise begins. `seed` is taken modulo 2**64; `position` counts tokens from the sequence's
    start, prompt included. Every `purpose` has noise of its own; 0 is to choose the model's token."""
    word = mix(seed % 2**64)
    if purpose:
        word = mix(word ^ purpose)
    return mix((word + (position + 1) * GOLDEN) % 2**64)


def noise(begin: int, token_ids: Ids) -> Floats:
    """A number in (0, 1) for each of the tokens, as if drawn uniformly."""
    words = _words(begin, (token_ids.astype(np.uint64) + np.uint64(1)) * np.uint64(GOLDEN)) >> np.uint64(UNUSED_BITS)
    return (words.astype(np.float64) + 0.5) * UNIT


def noise_of(begin: int, token_id: int) -> float:
    """`noise` of one token, without numpy's cost."""
    return ((mix((begin + (token_id + 1) * GOLDEN) % 2**64) >> UNUSED_BITS) + 0.5) * UNIT


def pick(weight: Weights, begin: int) -> int:
    """The token of [V] that arrives first; `weight` need not sum to 1, and is above 0 somewhere.

    The likeliest token's time bounds the winner's. As -log(1 - u) >= u, few tokens have noise so small that they may
    arrive before, and only theirs goes through a logarithm. Tokens that the least noise there is would bring too late
    need none at all.
    """
    likeliest = int(weight.argmax())
    latest = -math.log1p(-noise_of(begin, likeliest)) / float(weight[likeliest])
    in_time = weight * np.float32(latest * SLACK) >= LEAST_NOISE
    if len(weight) <= FEW or 4 * np.count_nonzero(in_time) < len(weight):
        ids = np.flatnonzero(in_time)
    else:
        ids = np.concatenate([at + _early(weight[at : at + BLOCK], latest, at, begin) for at in _blocks(weight)])
    return int(ids[_arrivals(weight, ids, begin).argmin()])


def _blocks(weight: Weights) -> range:
    return range(0, len(weight), BLOCK)


def _early(weight: Weights, latest: float, first_id: int, begin: int) -> Ids:
    """Which of at most BLOCK consecutive tokens may arrive by `latest`; for a first look half of a word is enough."""
    words = _words(begin + first_id * GOLDEN, STEPS[: len(weight)])
    upper = (words >> np.uint64(32)).astype(np.float32)
    return np.flatnonzero(upper < weight * np.float32(latest * SLACK * 2**32))


def _arrivals(weight: Weights, ids: Ids, begin: int) -> Floats:
    """When tokens arrive: -log(1 - u) / weight."""
    return -np.log1p(-noise(begin, ids)) / weight[ids]


def _words(begin: int, steps: Words) -> Words:
    return mix_words(steps + np.uint64(begin % 2**64))
