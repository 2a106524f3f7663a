"""Drawing by Gumbel noise: the noise itself, who wins, and how often two distributions choose the same."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from shared.engine.sampling import gumbel
from shared.engine.splitmix import GOLDEN, mix, mix_words
from tests.unit.drawing import chi_square_bound

NUM_DRAWS = 4_000


def weights(vocab: int, scale: float, seed: int = 0) -> Any:
    """Float32 [vocab], the largest 1."""
    logits = np.random.default_rng(seed).normal(scale=scale, size=vocab)
    return np.exp(logits - logits.max()).astype(np.float32)


def by_brute_force(weight: Any, begin: int) -> int:
    """argmax(log weight + Gumbel noise), of all tokens."""
    gumbels = -np.log(-np.log1p(-gumbel.noise(begin, np.arange(len(weight)))))
    with np.errstate(divide="ignore"):
        return int((np.log(weight.astype(np.float64)) + gumbels).argmax())


def chi_square(found: Any, expected: Any) -> float:
    return float(((found - expected) ** 2 / expected).sum())


# The noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_what_it_always_was() -> None:
    """A change would tear sequences that are continued by a newer worker."""
    assert gumbel.start(0, 0) == 0xE220A8397B1DCDAF  # the first output of splitmix64.c from 0
    assert gumbel.noise(gumbel.start(2**64 - 1, 100_000), np.array([0, 154_855])).tolist() == [
        0.1362892186735204,
        0.6284943503792532,
    ]


@pytest.mark.parametrize(("seed", "position", "token"), [(0, 0, 0), (7, 1_048_575, 154_879), (2**64 - 1, 3, 16_384)])
def test_noise_is_a_function_of_three_integers(seed: int, position: int, token: int) -> None:
    begin = mix((mix(seed) + (position + 1) * GOLDEN) % 2**64)
    word = mix((begin + (token + 1) * GOLDEN) % 2**64)
    assert gumbel.start(seed, position) == begin
    assert gumbel.noise(begin, np.array([token]))[0] == ((word >> 12) + 0.5) / 2**52
    assert gumbel.noise_of(begin, token) == gumbel.noise(begin, np.array([token]))[0]


def test_seeds_are_taken_modulo_the_word() -> None:
    assert gumbel.start(2**64 + 5, 1) == gumbel.start(5, 1) != gumbel.start(6, 1)


def test_words_are_mixed_as_one_by_one() -> None:
    """The first outputs of Vigna's splitmix64.c from the state 1234567, and what numpy makes of the same words."""
    states = [(1234567 + n * GOLDEN) % 2**64 for n in range(1, 6)]
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert [mix(state) for state in states] == known
    assert mix_words(np.array(states, np.uint64)).tolist() == known


def test_noise_lies_inside_the_interval_whatever_the_word() -> None:
    words = np.array([0, 2**64 - 1], np.uint64) >> np.uint64(gumbel.UNUSED_BITS)
    least, most = (words + 0.5) * gumbel.UNIT
    assert 0 < least == gumbel.LEAST_NOISE
    assert most < 1


VARIED: dict[str, Callable[[int], Any]] = {
    "tokens": lambda n: gumbel.noise(gumbel.start(3, 5), np.arange(n)),
    "positions": lambda n: np.array([gumbel.noise(gumbel.start(3, p), np.array([5]))[0] for p in range(n)]),
    "seeds": lambda n: np.array([gumbel.noise(gumbel.start(s, 3), np.array([5]))[0] for s in range(n)]),
}


@pytest.mark.parametrize("varied", VARIED)
def test_neighbours_of_every_kind_have_even_and_independent_noise(varied: str) -> None:
    """Chi-square of pairs of neighbours over a grid: even, and without regard to each other."""
    numbers = VARIED[varied](20_000)
    grid = np.histogram2d(numbers[:-1], numbers[1:], bins=12, range=((0, 1), (0, 1)))[0]
    assert chi_square(grid, grid.sum() / grid.size) < chi_square_bound(grid.size - 1)
    low_bits = np.bincount((numbers * 2**52).astype(np.int64) % 16, minlength=16)
    assert chi_square(low_bits, len(numbers) / 16) < chi_square_bound(15)


# Who wins -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 2, 97, gumbel.BLOCK - 1, gumbel.BLOCK, 3 * gumbel.BLOCK + 1])
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 30.0])
def test_the_winner_is_that_of_all_tokens(vocab: int, scale: float) -> None:
    """However many were passed over."""
    weight = weights(vocab, scale)
    for position in range(12):
        begin = gumbel.start(1, position)
        assert gumbel.pick(weight, begin) == by_brute_force(weight, begin)


@pytest.mark.parametrize("kept", [1, 5, 3_000, 30_000])
def test_a_token_without_weight_never_wins(kept: int) -> None:
    weight = weights(40_000, 1.0)
    weight[np.random.default_rng(kept).permutation(40_000)[kept:]] = 0
    for position in range(12):
        begin = gumbel.start(2, position)
        winner = gumbel.pick(weight, begin)
        assert weight[winner] > 0
        assert winner == by_brute_force(weight, begin)


def test_draws_from_a_large_vocabulary_follow_the_distribution() -> None:
    """Chi-square over groups of tokens of about equal probability, in the order of ids and in that of weights."""
    weight = weights(50_000, 2.0)
    drawn = np.array([gumbel.pick(weight, gumbel.start(9, position)) for position in range(NUM_DRAWS)])
    for order in (np.arange(len(weight)), np.argsort(weight)):
        cumulative = weight[order].cumsum(dtype=np.float64) / weight.sum(dtype=np.float64)
        group = np.empty(len(weight), np.int64)
        group[order] = np.minimum((cumulative * 30).astype(int), 29)
        expected = np.bincount(group, weight, 30) / weight.sum(dtype=np.float64) * NUM_DRAWS
        assert chi_square(np.bincount(group[drawn], minlength=30), expected) < chi_square_bound(29)


# Two distributions ----------------------------------------------------------------------------------------------------


def coupling(p: Any, q: Any) -> float:
    """How often both choose the same token: the sum over i of 1 / sum over j of max(p[j] / p[i], q[j] / q[i])."""
    return float(sum(1 / np.maximum(p / own_p, q / own_q).sum() for own_p, own_q in zip(p, q, strict=True)))


def by_inversion(weight: Any, uniform: float) -> int:
    """Where a number falls in the cumulative distribution by ids."""
    cumulative = weight.cumsum(dtype=np.float64)
    return int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right"))


@pytest.mark.parametrize("noise", [0.1, 0.3, 0.6, 1.0])
def test_similar_distributions_mostly_choose_the_same_token(noise: float) -> None:
    """1 - TV is the most that any drafts can reach, and rejection sampling does. This stays within 9 points of it here,
    never falls below (1 - TV) / (1 + TV) (Daliri, Musco, Suresh 2024), and beats one number for both by inversion."""
    chance = np.random.default_rng(5)
    logits = chance.normal(scale=4.0, size=2_000)
    p, q = (np.exp(row - row.max()) for row in (logits, logits + chance.normal(scale=noise, size=2_000)))
    p, q = (p / p.sum()).astype(np.float32), (q / q.sum()).astype(np.float32)
    begins = [gumbel.start(4, position) for position in range(NUM_DRAWS)]
    same = np.mean([gumbel.pick(p, begin) == gumbel.pick(q, begin) for begin in begins])
    uniforms = chance.random(NUM_DRAWS)
    old = np.mean([by_inversion(p, uniform) == by_inversion(q, uniform) for uniform in uniforms])
    distance, error = np.abs(p - q).sum() / 2, 3.3 * math.sqrt(0.25 / NUM_DRAWS)
    assert same == pytest.approx(coupling(p, q), abs=error)
    assert max((1 - distance) / (1 + distance), 1 - distance - 0.09) <= coupling(p, q) <= 1 - distance
    assert same > old + error
