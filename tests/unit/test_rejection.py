"""Rejection sampling of drafts: what comes out has the model's own distribution, whoever proposed what, however many,
and wherever a sequence was broken off. Seeds and clocks are fixed, so every verdict here is always the same."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from shared.engine.api import BatchItem, EngineRequest, SampledToken, SamplingParams, TokensSampled
from shared.engine.engine import Engine
from shared.engine.sampling import gumbel, rejection
from shared.engine.sampling.rejection import RejectionSampler
from shared.engine.sampling.sampler import Sampler
from shared.engine.speculation.ngram import NgramProposer
from shared.engine.speculation.speculator import Speculation
from tests.unit.drawing import chi_square_bound, item, rows
from tests.unit.markov import Trial, engine, executor, outputs

COUNT = 600
PROMPT = (0, 1, 2, 3, 1, 0, 2, 1, 3, 0, 1)
BY_LAYER = Speculation(3, adaptive=False)
BY_TEXT = Speculation(3, adaptive=False, make_proposer=NgramProposer)
ONE = 1  # draft
SAMPLINGS: dict[str, dict[str, Any]] = {
    "temperature 1": {},
    "temperature and cuts": {"temperature": 1.2, "top_k": 3, "top_p": 0.95, "min_p": 0.05},
    "penalties": {"frequency_penalty": 0.6, "presence_penalty": 0.4, "repetition_penalty": 1.3},
    "bias, and a token that may not come": {"logit_bias": ((2, 0.8),), "min_tokens": 4, "stop_token_ids": (1,)},
}


def trial(**params: Any) -> Trial:
    return Trial(SamplingParams(**({"temperature": 1.0, "max_tokens": 4, "ignore_eos": True} | params)), PROMPT)


def excess(found: Mapping[str, tuple[int, ...]], expected: Mapping[tuple[int, ...], float]) -> float:
    """Chi-square of whole outputs or of two neighbours in them, the larger, over what 99.9 % of fair samplers stay
    below: fair if below 1.

    A token that is drawn wrongly shows with its neighbour before it is lost among whole outputs: with the mistakes
    below, 600 outputs say by their neighbours what 1,200 say by themselves.
    """
    length = len(next(iter(expected)))
    parts = [slice(0, length), *(slice(place, place + 2) for place in range(length - 2 and length - 1))]
    return max(_excess(Counter(output[part] for output in found.values()), _of(part, expected)) for part in parts)


def _of(part: slice, expected: Mapping[tuple[int, ...], float]) -> Mapping[tuple[int, ...], float]:
    """The probabilities of a part of the outputs, whatever the rest."""
    sums: dict[tuple[int, ...], float] = defaultdict(float)
    for output, likely in expected.items():
        sums[output[part]] += likely
    return sums


def _excess(counts: Mapping[tuple[int, ...], int], expected: Mapping[tuple[int, ...], float]) -> float:
    """Of either. What is rarer than 5 counts together."""
    total = sum(counts.values())
    assert set(counts) <= {output for output, likely in expected.items() if likely > 0}
    common = {output: likely * total for output, likely in expected.items() if likely * total >= 5}
    pairs = [(counts.get(output, 0), often) for output, often in common.items()]
    rare = total - sum(common.values())
    if rare > 1e-6 * total:
        pairs.append((total - sum(count for count, _ in pairs), rare))
    return sum((count - often) ** 2 / often for count, often in pairs) / chi_square_bound(len(pairs) - 1)


def run(
    asked: Trial,
    speculation: Speculation,
    *,
    reject: bool = True,
    count: int = COUNT,
    together: int = 10_000,
    behind: bool = False,
) -> tuple[dict[str, tuple[int, ...]], Engine]:
    drafts = speculation.make_proposer is None
    serving = engine(executor(rejection=reject, drafts=drafts, behind=behind), speculation)
    return outputs(serving, asked.requests(count), together=together), serving


# The distribution -----------------------------------------------------------------------------------------------------


ROW_BY_ROW, AHEAD = False, True  # as on a CPU, and batched and launched ahead, as on a GPU
WAYS = {ROW_BY_ROW: "row by row", AHEAD: "ahead"}
both_ways = pytest.mark.parametrize("behind", WAYS, ids=WAYS.values())
# Row by row a draft of the layer has the tokens that it has ahead, whatever is asked: `test_batched_rejection`.
CASES = [(BY_LAYER, sampling, AHEAD) for sampling in SAMPLINGS] + [(BY_LAYER, "temperature 1", ROW_BY_ROW)]
CASES += [(BY_TEXT, sampling, way) for sampling in ("temperature and cuts", "penalties") for way in WAYS]


@pytest.mark.parametrize(
    ("speculation", "sampling", "behind"),
    CASES,
    ids=[f"{'layer' if case[0] is BY_LAYER else 'text'}-{case[1]}-{WAYS[case[2]]}" for case in CASES],
)
def test_whole_outputs_follow_the_models_distribution(speculation: Speculation, sampling: str, behind: bool) -> None:
    asked = trial(**SAMPLINGS[sampling])
    found, serving = run(asked, speculation, behind=behind)
    counts = serving.draft_counts()
    assert counts.verified[0] > 0.4 * COUNT
    assert 0.2 * sum(counts.verified) < sum(counts.accepted) < 0.9 * sum(counts.verified)
    assert excess(found, asked.expected()) < 1


def test_coupled_verification_passes_the_same_test() -> None:
    asked = trial(**SAMPLINGS["penalties"])
    found, serving = run(asked, replace(BY_LAYER, num_drafts=ONE), reject=False)
    assert serving.draft_counts().accepted[0] > 0.2 * COUNT
    assert excess(found, asked.expected()) < 1


@both_ways
def test_the_distribution_holds_while_the_number_of_drafts_adapts(behind: bool) -> None:
    asked = trial(max_tokens=5)
    found, serving = run(asked, replace(BY_LAYER, adaptive=True), together=50, behind=behind)
    verified = serving.draft_counts().verified
    assert len(verified) == 3
    assert verified[0] > 1.1 * verified[1] > 1.2 * verified[2]
    assert excess(found, asked.expected()) < 1


@both_ways
def test_the_distribution_holds_where_sequences_are_preempted(behind: bool) -> None:
    """What is left of their drafts then is verified without what those were drawn from."""
    asked = replace(trial(max_tokens=6), prompt=PROMPT[:3])
    serving = engine(executor(1, rejection=True, behind=behind), BY_LAYER, num_pages=60)
    found = outputs(serving, asked.requests(COUNT), together=12)
    assert serving.load().num_preemptions > COUNT / 10
    assert serving.draft_counts().verified[0] > COUNT
    assert excess(found, asked.expected()) < 1


@both_ways
@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_distribution_holds_where_outputs_are_continued_elsewhere(num_steps: int, behind: bool) -> None:
    """The first worker is lost after some steps; what it had said by then is kept, and what it was to say is not."""
    asked = trial(max_tokens=5)
    requests = asked.requests(COUNT)
    said = outputs(engine(executor(rejection=True, behind=behind), BY_LAYER), requests, num_steps=num_steps)
    going_on = [
        replace(each, output_token_ids=said[each.request_id]) for each in requests if len(said[each.request_id]) < 5
    ]
    assert len(going_on) > COUNT / 10
    there = executor(rejection=True, behind=behind)
    found = said | outputs(engine(there, replace(BY_LAYER, num_drafts=2)), going_on)
    assert excess(found, asked.expected()) < 1


@both_ways
def test_drafts_that_are_handed_over_are_as_good_as_with_coupled_verification(behind: bool) -> None:
    """Nobody here knows what those were drawn from, and whoever drew them need not verify as we do: it is all one."""
    asked = trial().requests(COUNT)
    firsts = handed_over(asked, reject=True, behind=behind)
    assert firsts == handed_over(asked, reject=False)
    going_on = [
        replace(each, output_token_ids=(first.tokens[0].token_id,), draft_token_ids=first.draft_token_ids)
        for each, first in zip(asked, firsts, strict=True)
    ]
    serving = engine(executor(rejection=True, behind=behind), BY_LAYER)
    assert excess(outputs(serving, going_on), trial().expected()) < 1
    assert serving.draft_counts().verified[0] > COUNT


def handed_over(asked: Sequence[EngineRequest], *, reject: bool, behind: bool = False) -> list[TokensSampled]:
    """What a prefill worker says of each request."""
    prefill = engine(executor(rejection=reject, behind=behind), BY_LAYER)
    for request in asked:
        prefill.submit(replace(request, prefill_only=True))
    found: dict[str, TokensSampled] = {}
    while len(found) < len(asked):
        found |= {event.request_id: event for event in prefill.step() if isinstance(event, TokensSampled)}
    return [found[request.request_id] for request in asked]


# Mistakes are found ---------------------------------------------------------------------------------------------------

COUNT_OF_TWO = 1_200


def excess_of_two(speculation: Speculation, **params: Any) -> float:
    """Of the first two tokens, which come in two steps: the second is the first that has a draft, and all mistakes are
    felt there. So nothing else is computed."""
    asked, drafts = trial(max_tokens=3, **params), replace(speculation, num_drafts=ONE)
    serving = engine(executor(rejection=True, drafts=drafts.make_proposer is None), drafts)
    found = outputs(serving, asked.requests(COUNT_OF_TWO), num_steps=2)
    assert serving.draft_counts().verified[0] > 0.4 * COUNT_OF_TWO
    return excess({name: output[:2] for name, output in found.items()}, asked.expected(2))


def test_the_first_two_tokens_alone_follow_the_models_distribution() -> None:
    assert excess_of_two(BY_LAYER) < 1


def no_rest(p: Any, _q: Any) -> Any:
    return p


def always(*_: Any) -> bool:
    return True


def blind_to_q(p: Any, _q: Any, token_id: int, chance: float) -> bool:
    return bool(chance < p[token_id] / p.sum())


MISTAKES: dict[str, dict[str, Any]] = {
    "a refused draft is replaced by a draw from p": {"rest": no_rest},
    "every draft is accepted": {"accepts": always},
    "what drafts were drawn from is forgotten": {"accepts": blind_to_q},
    "the verdict has the noise of the draft": {"VERDICT": rejection.DRAFT},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_method_is_found(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, planted in MISTAKES[mistake].items():
        monkeypatch.setattr(rejection, name, planted)
    assert excess_of_two(BY_LAYER) > 1


class Unpenalized(RejectionSampler):
    """Draws drafts as asked, but believes that they were drawn without penalties."""

    def propose(self, rows: torch.Tensor, items: Sequence[BatchItem], number: int, /) -> list[int]:
        drafts = super().propose(rows, items, number)
        for row, each in zip(rows, items, strict=True):
            plain = replace(each.sampling, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0)
            last = self._proposed[each.request_id][-1]
            weight = self._weigh(row, int(row.argmax()), replace(each, sampling=plain))[1]
            assert weight is not None
            self._proposed[each.request_id][-1] = replace(last, weight=weight)
        return drafts


class Redraws(Sampler):
    """Accepts a draft of the text with p(x), but then draws from p, x and all."""

    def __call__(self, rows: torch.Tensor, items: Sequence[BatchItem], /) -> list[tuple[SampledToken, ...]]:
        self.drafts = {
            (each.request_id, p): token for each in items for p, token in enumerate(each.drafts, each.position)
        }
        return super().__call__(rows, items)

    def _draw(self, weight: Any, item: BatchItem) -> int:
        draft = self.drafts.get((item.request_id, item.position))
        chance = rejection.uniform(gumbel.start(item.sampling.seed, item.position, rejection.VERDICT))
        if draft is not None and chance < weight[draft] / weight.sum():
            return draft
        return super()._draw(weight, item)


@pytest.mark.parametrize(
    ("kind", "speculation", "params"),
    [(Unpenalized, BY_LAYER, {"repetition_penalty": 2.5, "presence_penalty": 1.0}), (Redraws, BY_TEXT, {})],
)
def test_a_sampler_that_is_nearly_right_is_found(
    kind: type[Sampler], speculation: Speculation, params: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shared.engine.executor.Sampler", kind)
    monkeypatch.setattr("shared.engine.executor.RejectionSampler", kind)
    assert excess_of_two(speculation, **params) > 1


# Tokens ---------------------------------------------------------------------------------------------------------------


def test_the_same_seeds_with_the_same_drafts_give_the_same_tokens() -> None:
    first, again = (run(trial(), BY_LAYER, count=200)[0] for _ in range(2))
    assert first == again


def test_other_drafts_give_other_tokens() -> None:
    """That is the price."""
    three, one, none = (run(trial(), replace(BY_LAYER, num_drafts=num), count=200)[0] for num in (3, 1, 0))
    assert three != one != none != three


def test_drafts_of_the_text_change_no_token() -> None:
    drafted, plain = (run(trial(), speculation, count=200)[0] for speculation in (BY_TEXT, Speculation()))
    assert drafted == plain


def test_without_drafts_tokens_are_those_of_coupled_verification() -> None:
    rejecting, coupled = (run(trial(), Speculation(), reject=reject, count=200)[0] for reject in (True, False))
    assert rejecting == coupled


@pytest.mark.parametrize("params", [{}, {"presence_penalty": 0.7, "logit_bias": ((2, 0.5),)}], ids=str)
def test_greedy_output_is_the_same_to_the_token(params: dict[str, Any]) -> None:
    asked = trial(temperature=0.0, max_tokens=40, **params)
    runs = [
        run(asked, speculation, reject=reject, count=3)[0]
        for speculation, reject in ((BY_LAYER, True), (BY_LAYER, False), (Speculation(), False))
    ]
    assert runs[0] == runs[1] == runs[2]


def test_more_drafts_are_accepted_than_with_coupled_verification() -> None:
    asked = trial(max_tokens=12)
    shares = []
    for reject in (True, False):
        counts = run(asked, replace(BY_LAYER, num_drafts=ONE), reject=reject, count=200)[1].draft_counts()
        shares.append(counts.accepted[0] / counts.verified[0])
    assert shares[0] > shares[1]


def test_logprobs_are_the_models_own() -> None:
    """Whether a token was a draft, or came instead of one."""
    sampler, given = RejectionSampler(97, ()), rows(4)
    first = item((1, 2, 3), 1, temperature=1.0, num_logprobs=2)
    (draft,) = sampler.propose(given[:1], [replace(first, sampling=replace(first.sampling, num_logprobs=None))], 0)
    verified = replace(first, token_ids=(3, draft), num_drafts=1)
    (chosen,) = sampler(given[1:3], [verified])
    for row, token in zip(given[1:3], chosen, strict=False):
        logprobs = torch.log_softmax(row, dim=-1)
        assert token.logprob == pytest.approx(float(logprobs[token.token_id]))
        assert [each for each, _ in token.top] == logprobs.topk(2).indices.tolist()


# The rule -------------------------------------------------------------------------------------------------------------

P, Q = np.array([0.5, 1.0, 0.25, 0.25], np.float32), np.array([0.1, 0.1, 0.2, 0.0], np.float32)


def test_a_draft_is_accepted_with_the_ratio_of_its_probabilities() -> None:
    """p is (1/4, 1/2, 1/8, 1/8), q is (1/4, 1/4, 1/2, 0)."""
    for token_id, ratio in ((0, 1.0), (1, 1.0), (2, 0.25)):
        assert rejection.accepts(P, Q, token_id, ratio - 1e-6)
        assert ratio == 1 or not rejection.accepts(P, Q, token_id, ratio + 1e-6)


def test_what_a_refused_draft_leaves_is_what_p_has_more_than_q() -> None:
    np.testing.assert_allclose(rejection.rest(P, Q), [0, 1, 0, 0.5], atol=1e-7)


def test_equal_distributions_leave_nothing_and_any_draw_is_right() -> None:
    assert rejection.rest(P, 3 * P) is P
    assert all(rejection.accepts(P, 3 * P, token_id, 1 - 2**-53) for token_id in range(4))


def test_a_draft_that_was_cut_from_the_models_distribution_is_never_accepted() -> None:
    assert not rejection.accepts(np.array([0, 1], np.float32), np.array([1, 1], np.float32), 0, 2**-53)


def test_noise_for_different_purposes_is_independent() -> None:
    """Chi-square of pairs over a grid, for every two purposes of a position, and for drafts of one position."""
    purposes = [0, rejection.VERDICT, rejection.REST, rejection.DRAFT, rejection.DRAFT + 1]
    numbers = [
        np.array([rejection.uniform(gumbel.start(5, position, purpose)) for position in range(4_000)])
        for purpose in purposes
    ]
    for place, one in enumerate(numbers):
        for other in numbers[:place]:
            grid = np.histogram2d(one, other, bins=8, range=((0, 1), (0, 1)))[0]
            even = grid.sum() / grid.size
            assert ((grid - even) ** 2 / even).sum() < chi_square_bound(grid.size - 1)
