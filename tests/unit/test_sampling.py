"""Choosing tokens, against plain numpy in float64."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from shared.engine.api import BatchItem, SampledToken, SamplingParams
from shared.engine.sampling import distribution, gumbel
from shared.engine.sampling.sampler import Sampler
from tests.unit.drawing import CUTS, EOS, MIXED, VOCAB, chi_square_bound, item, plain_distribution, rows


def choose(logits: torch.Tensor, *items: BatchItem) -> list[SampledToken]:
    return [token for (token,) in Sampler(VOCAB, (EOS,))(logits, items)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_distribution_is_that_of_the_definitions(cut: dict[str, Any]) -> None:
    params = SamplingParams(**({"temperature": 1.0} | cut))
    for row in rows(20):
        weight = distribution.weights(row, params).double().numpy()
        np.testing.assert_allclose(weight / weight.sum(), plain_distribution(row, params), rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_the_choice_is_that_of_the_highest_log_probability_plus_noise(cut: dict[str, Any]) -> None:
    for position, row in enumerate(rows(20)):
        asked = item(range(position + 1), 1, **({"temperature": 1.0, "seed": position} | cut))
        likely = plain_distribution(row, asked.sampling)
        uniform = 1 - gumbel.noise(gumbel.start(position, position + 1), np.arange(VOCAB))
        with np.errstate(divide="ignore"):
            expected = int((np.log(likely) - np.log(-np.log(uniform))).argmax())
        assert choose(row[None], asked)[0].token_id == expected


def test_equally_likely_tokens_are_cut_from_the_highest_id() -> None:
    row = torch.zeros(10)
    kept = distribution.weights(row, SamplingParams(temperature=1.0, top_k=3))
    assert kept.nonzero().flatten().tolist() == [0, 1, 2]
    kept = distribution.weights(row, SamplingParams(temperature=1.0, top_p=0.35))
    assert kept.nonzero().flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.95, 1 - 1e-6, 1 - 2**-53])
def test_a_nucleus_has_the_same_weights_in_whatever_order_they_come(p: float) -> None:
    """Sums of floats would differ in their last bits, and now and then by a token."""
    weight = torch.exp(-rows(1, 20_000, scale=4.0)[0].abs())
    for seed in range(5):
        order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
        kept = distribution.top_p(weight[order], p)
        assert torch.equal(kept[order.argsort()], distribution.top_p(weight, p))


def test_a_share_of_a_sum_is_at_least_one_unit_and_never_more_than_all() -> None:
    assert [distribution.wanted_units(10, p) for p in (0.0, 0.05, 0.1, 0.11, 0.999)] == [1, 1, 1, 2, 10]
    assert all(distribution.wanted_units(2**62 - gap, 1 - 2**-53) <= 2**62 - gap for gap in range(1, 2000, 7))


def test_greedy_takes_the_lowest_of_equal_tokens() -> None:
    for size in (VOCAB, 1000, 49152):
        row = torch.zeros(1, size)
        row[0, [size - 1, size // 2, 33]] = 1.0
        assert Sampler(size, ())(row, [item()])[0] == (SampledToken(33),)


def test_a_padded_vocabulary_is_never_chosen() -> None:
    padded = torch.zeros(2, VOCAB + 31)
    padded[:, VOCAB:] = 9.0
    for sampled in choose(padded, item(), item(temperature=5.0)):
        assert sampled.token_id < VOCAB


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_samples_follow_the_distribution(cut: dict[str, Any]) -> None:
    """Chi-square over 3,000 draws; tokens that are rarer than 5 draws count together."""
    params: dict[str, Any] = {"temperature": 1.0} | cut
    row, num_draws, asked = rows(1, seed=4, scale=1.0)[0], 3_000, SamplingParams(**params)
    weight = distribution.weights(row, asked).numpy()  # that the sampler draws from this, and how, is shown above
    drawn = Counter(gumbel.pick(weight, gumbel.start(11, position)) for position in range(1, num_draws + 1))
    expected = plain_distribution(row, asked) * num_draws
    assert all(expected[token] for token in drawn)
    common = [int(token) for token in np.flatnonzero(expected >= 5)]
    pairs = [(drawn[token], expected[token]) for token in common]
    rare = expected.sum() - sum(often for _, often in pairs)
    if rare > 1e-6 * num_draws:
        pairs.append((num_draws - sum(found for found, _ in pairs), rare))
    chi_square = sum((found - often) ** 2 / often for found, often in pairs)
    assert chi_square < chi_square_bound(len(pairs) - 1)


def test_a_choice_does_not_depend_on_the_batch() -> None:
    torch.set_num_threads(1)
    logits = rows(len(MIXED), 49152)
    items = [item((1, 2, 3, 4, 5, 4), 3, **params) for params in MIXED]
    sampler = Sampler(49152, (EOS,))
    alone = [sampler(logits[index : index + 1].clone(), [items[index]])[0] for index in range(len(items))]
    assert sampler(logits, items) == alone
    assert sampler(logits.flip(0), items[::-1]) == alone[::-1]


def test_the_logits_are_left_as_they_were() -> None:
    logits = rows(len(MIXED))
    before = logits.clone()
    choose(logits, *(item(**params) for params in MIXED))
    assert torch.equal(logits, before)


def test_the_seed_and_the_position_determine_the_choice() -> None:
    row = torch.zeros(1, VOCAB)
    asked = [item([0] * n, 1, temperature=1.0, seed=seed) for n in (4, 9) for seed in (1, 3)]
    first = [choose(row, each)[0] for each in asked]
    assert [choose(row, each)[0] for each in asked] == first
    assert len(set(first)) == 4


HISTORY, OUTPUT_START = (4, 8, 8, 15, 15, 15, 16), 3


def adjusted_argmax(row: torch.Tensor, params: SamplingParams) -> int:
    logits = row.double().numpy().copy()
    for token in set(HISTORY):
        logits[token] *= params.repetition_penalty if logits[token] < 0 else 1 / params.repetition_penalty
    for token, count in Counter(HISTORY[OUTPUT_START:]).items():
        logits[token] -= params.presence_penalty + count * params.frequency_penalty
    for token, bias in params.logit_bias:
        logits[token] += bias
    return int(logits.argmax())


@pytest.mark.parametrize(
    "change",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 0.5},
        {"presence_penalty": 1.5},
        {"presence_penalty": -2.0},
        {"frequency_penalty": 0.7},
        {"frequency_penalty": -1.0, "presence_penalty": 0.5, "repetition_penalty": 1.1},
        {"logit_bias": ((8, 2.0), (90, -3.0))},
    ],
    ids=str,
)
def test_penalties_and_bias_change_the_logits_as_defined(change: dict[str, Any]) -> None:
    logits = rows(200, scale=1.0)
    logits[:, [4, 8, 15, 16]] += 1.5
    asked = item(HISTORY, OUTPUT_START, **change)
    found = [sampled.token_id for sampled in choose(logits, *[asked] * 200)]
    assert found == [adjusted_argmax(row, asked.sampling) for row in logits]
    assert found != logits.argmax(-1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("num_output", "change", "expected"),
    [
        (0, {"min_tokens": 2}, 6),
        (1, {"min_tokens": 2}, 6),
        (2, {"min_tokens": 2}, EOS),
        (0, {"min_tokens": 0}, EOS),
        (0, {"min_tokens": 2, "ignore_eos": True}, EOS),
        (0, {"min_tokens": 2, "stop_token_ids": (6, 10**6, -1)}, 7),
        (0, {"min_tokens": 2, "stop_token_ids": (6,), "ignore_eos": True}, EOS),
    ],
)
def test_stop_tokens_cannot_be_chosen_before_the_least_length(
    temperature: float, num_output: int, change: dict[str, Any], expected: int
) -> None:
    row = torch.full((1, VOCAB), -100.0)
    row[0, EOS], row[0, 6], row[0, 7] = 100, 50, 0
    asked = item([1] * (3 + num_output), 3, temperature=temperature, **change)
    assert choose(row, asked)[0].token_id == expected


def test_a_token_is_chosen_even_if_every_one_is_forbidden() -> None:
    asked = item(temperature=1.0, min_tokens=9, stop_token_ids=tuple(range(VOCAB)))
    assert choose(rows(1), asked)[0].token_id == 0


def test_logprobs_are_the_models_own() -> None:
    row = rows(1)
    asked = item((1, 2, 9), 2, temperature=0.1, logit_bias=((9, 100.0),), presence_penalty=1.0, num_logprobs=4)
    sampled = choose(row, asked)[0]
    logprobs = row[0].double() - row[0].double().logsumexp(0)
    expected = sorted(range(VOCAB), key=lambda token: (-float(logprobs[token]), token))[:4]
    assert sampled.token_id == 9
    assert sampled.logprob == pytest.approx(float(logprobs[9]), abs=1e-5)
    assert [token for token, _ in sampled.top] == expected
    assert [value for _, value in sampled.top] == pytest.approx([float(logprobs[t]) for t in expected], abs=1e-5)


@pytest.mark.parametrize(("asked", "num_top"), [(None, 0), (0, 0), (1, 1), (VOCAB, VOCAB), (VOCAB + 9, VOCAB)])
def test_as_many_logprobs_are_given_as_were_asked_for(asked: int | None, num_top: int) -> None:
    sampled = choose(rows(1), item(num_logprobs=asked))[0]
    assert (sampled.logprob is None, len(sampled.top)) == (asked is None, num_top)


def test_equal_logprobs_are_listed_by_id() -> None:
    sampled = choose(torch.zeros(1, VOCAB), item(num_logprobs=5))[0]
    assert [token for token, _ in sampled.top] == [0, 1, 2, 3, 4]
    assert sampled.logprob == pytest.approx(-math.log(VOCAB))


@pytest.mark.parametrize("temperature", [1e-6, 1e-4, 1e9])
def test_extreme_temperatures_choose_a_token(temperature: float) -> None:
    sampled = choose(rows(1, scale=1e4), item(temperature=temperature))[0]
    assert 0 <= sampled.token_id < VOCAB


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_computes_nonsense_still_gets_a_token_of_the_vocabulary(value: float) -> None:
    row = rows(1)
    row[0, 7] = value
    for temperature in (0.0, 1.0):
        assert choose(row, item(temperature=temperature, num_logprobs=1))[0].token_id == 7
