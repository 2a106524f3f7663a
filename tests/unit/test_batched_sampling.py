"""Choosing for all rows at once, beside its twin that chooses row by row."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shared.engine.api import BatchItem, SampledToken, SamplingParams, awaited
from shared.engine.sampling import adjusted as batched_logits
from shared.engine.sampling import distribution, draws, gumbel, logits
from shared.engine.sampling.batched import BatchedSampler
from shared.engine.sampling.sampler import Sampler
from shared.engine.splitmix import GOLDEN
from tests.unit.drawing import CUTS, EOS, MIXED, VOCAB, item, rows

LARGE = 49_152
PENALTIES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4, "presence_penalty": 0.3, "repetition_penalty": 0.8},
    {"logit_bias": ((7, 2.5), (8, -100.0), (10**6, 3.0))},
    {"min_tokens": 9, "stop_token_ids": (6, 10**6)},
    {"min_tokens": 9, "frequency_penalty": 0.3, "logit_bias": ((3, 1.5),), "repetition_penalty": 1.1},
]


def both(logits: torch.Tensor, items: Sequence[BatchItem], vocab: int = VOCAB) -> list[list[tuple[SampledToken, ...]]]:
    return [kind(vocab, (EOS,))(logits, items) for kind in (Sampler, BatchedSampler)]


def assert_alike(found: list[list[tuple[SampledToken, ...]]]) -> None:
    """Equal ids everywhere; log probabilities to within what the order of a sum over a row makes of them."""
    for one, other in zip(*found, strict=True):
        assert [token.token_id for token in one] == [token.token_id for token in other]
        for twin, ours in zip(one, other, strict=True):
            assert ours.logprob == (None if twin.logprob is None else pytest.approx(twin.logprob, abs=1e-5))
            assert [token_id for token_id, _ in ours.top] == [token_id for token_id, _ in twin.top]
            assert [value for _, value in ours.top] == pytest.approx([value for _, value in twin.top], abs=1e-5)


@pytest.mark.parametrize("cut", [*CUTS, {"temperature": 0.0}], ids=str)
def test_rows_of_one_kind_choose_what_each_would_alone(cut: dict[str, Any]) -> None:
    for vocab in (VOCAB, LARGE):
        items = [item([0] * n, 1, **({"temperature": 1.0, "seed": n} | cut)) for n in range(1, 9)]
        assert_alike(both(rows(8, vocab), items, vocab))


def packed(token_ids: Sequence[int]) -> bytes:
    bits = np.zeros(-(-VOCAB // 32) * 32, dtype=np.uint8)
    bits[list(token_ids)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


@pytest.mark.parametrize(
    "kind", [{}, {"temperature": 1.3, "seed": 4}, {"temperature": 1.0, "logit_bias": ((7, 90.0),)}], ids=str
)
def test_only_what_a_grammar_allows_is_chosen(kind: dict[str, Any]) -> None:
    some, others, one = packed(range(20, 40)), packed([0, 8, 31, 32, VOCAB - 1]), packed([VOCAB - 2])
    held = [replace(item([1, 2, 3], 3, **kind), allowed=(allowed,)) for allowed in (some, others, None, one)]
    drafted = replace(item([1, 2, 21, 50], 2, **kind), num_drafts=2, history=(1, 2), allowed=(some, others, None))
    found = both(rows(4 + 1 + 3), [*held, item([1, 2, 3], 3, **kind), drafted])
    assert_alike(found)
    first, second, free, last, also_free, (*_, behind) = found[0]
    assert first[0].token_id in range(20, 40)
    assert second[0].token_id in (0, 8, 31, 32, VOCAB - 1)
    assert last[0].token_id == VOCAB - 2
    assert behind.token_id in (*range(20, 40), 0, 8, 31, 32, VOCAB - 1)
    plain = both(rows(8)[[2, 4]], [item([1, 2, 3], 3, **kind)] * 2)[0]
    assert [free, also_free] == plain


def test_rows_of_many_kinds_choose_what_each_would_alone() -> None:
    chance = random.Random(3)
    kinds = [*MIXED, *PENALTIES, *CUTS, {"temperature": 1.0, "num_logprobs": 200}, {"temperature": 1e-6}]
    for _ in range(10):
        chosen = [dict(chance.choice(kinds)) for _ in range(12)]
        for kind in chosen:
            kind.setdefault("temperature", chance.choice([0.0, 0.7, 1.5]))
        histories = [chance.choices(range(-1, VOCAB + 3), k=chance.randrange(1, 40)) for _ in chosen]
        items = [
            item(tokens, chance.randrange(len(tokens) + 1), **kind)
            for tokens, kind in zip(histories, chosen, strict=True)
        ]
        assert_alike(both(rows(12, seed=chance.randrange(99)), items))


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_adjusted_logits_equal_those_of_a_row_to_the_bit(penalty: dict[str, Any]) -> None:
    given = rows(4)
    items = [item((4, 8, 8, 15, 15, 15, 16), 3, **(penalty if row % 2 else {})) for row in range(4)]
    stops = [(6, EOS) if each.sampling.min_tokens else () for each in items]
    found = batched_logits.adjusted(given, items, stops, None)
    for row, each, stop in zip(range(4), items, stops, strict=True):
        twin = logits.penalized(given[row], each.sampling, each.history, each.output_start)
        twin = logits.without(logits.biased(twin, each.sampling.logit_bias), stop)
        assert torch.equal(found[row], twin if row % 2 else given[row])


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_weights_equal_those_of_a_row_to_the_bit(cut: dict[str, Any]) -> None:
    given, asked = rows(5, 2_000), item(**({"temperature": 0.7} | cut))
    tied = torch.cat([given, given.round()])
    found = draws.weights(tied, tied.amax(dim=1, keepdim=True), [asked] * 10)
    for row in range(10):
        assert torch.equal(found[row], distribution.weights(tied[row], asked.sampling))


@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_the_first_to_arrive_is_the_twins(scale: float) -> None:
    spread = rows(40, 5_000, scale=scale) - 100 * (rows(40, 5_000, seed=1) > 2)
    weight = torch.exp(spread - spread.amax(dim=1, keepdim=True))
    starts = [gumbel.start(seed, 3 * seed) for seed in range(40)]
    begins = torch.tensor(np.array(starts, np.uint64).view(np.int64))
    steps = torch.arange(1, 5_001) * (GOLDEN - 2**64)
    expected = [gumbel.pick(row.numpy(), start) for row, start in zip(weight, starts, strict=True)]
    assert draws.pick(weight, begins, steps).tolist() == expected


def test_many_rows_are_drawn_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [item([0] * n, 1, temperature=1.0) for n in range(1, 12)]
    expected = BatchedSampler(VOCAB, ())(rows(11), items)
    monkeypatch.setattr(draws, "MOST_NUMBERS", 3 * VOCAB + 1)
    assert BatchedSampler(VOCAB, ())(rows(11), items) == expected


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.0, "presence_penalty": 0.9}, {"repetition_penalty": 1.5}], ids=str
)
def test_drafts_are_verified_as_one_by_one(params: dict[str, Any]) -> None:
    given = rows(10)
    plain = given.argmax(dim=-1).tolist()
    right, wrong = plain[:3], [plain[4], 0, plain[6]]
    items = [
        replace(item((1, 2, 3), 1, **params), token_ids=(3, *drafts), num_drafts=len(drafts))
        for drafts in (right, wrong)
    ]
    items += [item((1, 2), 1, **params)] * 2
    found = both(given, items)
    assert_alike(found)
    assert params or [len(tokens) for tokens in found[1]] == [4, 2, 1, 1]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_that_is_still_awaited_counts_for_penalties(temperature: float, penalty: dict[str, Any]) -> None:
    given, before = rows(3), torch.tensor([40, 8, 15])
    known = [item((4, 8, 8, 15, token), 2, temperature=temperature, **penalty) for token in before.tolist()]
    late = [replace(each, token_ids=[awaited(place)], history=each.history[:-1]) for place, each in enumerate(known)]
    sampler = BatchedSampler(VOCAB, (EOS,))
    assert sampler.launch(given, late, before).send().collect() == sampler(given, known)
    order = [2, 0, 1]
    assert sampler.launch(given[order], [late[row] for row in order], before).tokens.tolist() == [
        sampler(given, known)[row][0].token_id for row in order
    ]


def test_the_logits_are_left_as_they_were() -> None:
    given = rows(len(MIXED) + len(PENALTIES))
    before = given.clone()
    BatchedSampler(VOCAB, (EOS,))(given, [item(**params) for params in (*MIXED, *PENALTIES)])
    assert torch.equal(given, before)


def test_a_padded_vocabulary_is_never_chosen() -> None:
    padded = torch.zeros(3, VOCAB + 31)
    padded[:, VOCAB:] = 9.0
    asked = [item(), item(temperature=5.0), item(temperature=5.0, repetition_penalty=1.1, num_logprobs=2)]
    assert_alike(both(padded, asked))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_model_that_computes_nonsense_still_gets_a_token_of_the_vocabulary(value: float) -> None:
    given = rows(2)
    given[0, 7], given[1] = value, value
    assert_alike(both(given, [item(temperature=1.0, top_p=0.9), item(temperature=1.0, top_k=3, min_p=0.1)]))


def test_nothing_is_chosen_for_no_rows() -> None:
    assert BatchedSampler(VOCAB, ())(rows(0), []) == []


def test_the_defaults_of_a_request_need_nothing_but_the_largest() -> None:
    given = rows(2)
    assert batched_logits.adjusted(given, [item(), item()], [(), ()], None) is given
    assert SamplingParams().temperature == 0
