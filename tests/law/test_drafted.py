"""The suite's law with drafts, most of them right and some wrong: they change how fast tokens come, never which."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from shared.engine.api import SamplingParams
from shared.engine.speculation.speculator import Speculation
from tests.law import test_prompt_logprobs as told
from tests.law import test_same_tokens as laws
from tests.law.conftest import BEHIND, DRAWN, GREEDY, NUM_TOKENS, REJECTION, SAMPLED, Law, TinyModels

NUM_DRAFTS = 4


class Prophet:
    """Proposes what the sequence will say, but for every fifth token."""

    def __init__(self, law: Law) -> None:
        self._law = law
        self._told: list[int] = []

    def propose(self, tokens: Sequence[int], num_drafts: int) -> list[int]:
        self._told = self._told or [*tokens, *self._law.tokens(list(tokens))]
        drafts = enumerate(self._told[len(tokens) : len(tokens) + num_drafts], len(tokens))
        return [token if position % 5 else (token + 1) % 211 for position, token in drafts]


BY_A_PROPHET, BY_ITSELF = "drafted by a prophet", "drafted by itself"
CASES = [
    (model, "", drafts, sampling)
    for model, drafts in (("sim", BY_A_PROPHET), ("sim", BY_ITSELF), ("llama", BY_A_PROPHET))
    for sampling in (GREEDY, SAMPLED)
]
CASES += [("glm-mtp", "", BY_ITSELF, sampling) for sampling in (GREEDY, SAMPLED)]
CASES += [("glm-mtp", REJECTION, BY_ITSELF, GREEDY)]
CASES += [("sim", BEHIND, drafts, SAMPLED) for drafts in (BY_A_PROPHET, BY_ITSELF)]
CASES += [("glm-mtp", BEHIND, BY_ITSELF, sampling) for sampling in (GREEDY, DRAWN, SAMPLED)]
# A random layer is never right about a random model, unless few tokens are left to choose from.
FEW_TOKENS = tuple((token_id, 200.0) for token_id in (5, 6, 7))


def _name(case: tuple[str, str, str, SamplingParams]) -> str:
    model, how, drafts, sampling = case
    way = f"{sampling.temperature}{' and penalties' if sampling.has_penalties else ''}"
    return f"{' '.join(filter(None, (model, how)))}, {drafts}, {way}"


@pytest.fixture(scope="module", params=CASES, ids=_name)
def drafted(request: pytest.FixtureRequest, tiny_models: TinyModels) -> Law:
    model, how, drafts, sampling = request.param
    law = tiny_models.law(model, how, replace(sampling, logit_bias=FEW_TOKENS) if model == "glm-mtp" else sampling)
    make_proposer = (lambda: Prophet(law)) if drafts == BY_A_PROPHET else None
    return replace(law, speculation=Speculation(NUM_DRAFTS, adaptive=False, make_proposer=make_proposer))


def test_drafts_are_accepted_and_refused_and_the_tokens_are_the_same(drafted: Law) -> None:
    prompt, worker = drafted.prompt(40), drafted.worker()
    assert worker.run(drafted.request(prompt)) == drafted.tokens(prompt)
    counts = worker.engine.draft_counts()
    assert 0 < sum(counts.accepted) < sum(counts.verified)
    assert worker.engine.load().num_steps < NUM_TOKENS


def test_drafted_as_many_as_are_worth_it(drafted: Law) -> None:
    assert drafted.speculation is not None
    adaptive = replace(drafted, speculation=replace(drafted.speculation, adaptive=True))
    laws.test_batched_with_others_that_come_and_go(adaptive)


def test_drafted_behind_chunks_of_an_odd_size(drafted: Law) -> None:
    laws.test_chunked_at_odd_sizes(7, drafted)


def test_drafted_behind_a_cached_prefix(drafted: Law) -> None:
    laws.test_prefix_cached(33, drafted)


def test_a_drafted_output_is_found_cached_by_the_next_turn(drafted: Law) -> None:
    laws.test_the_next_turn_of_a_conversation_finds_prompt_and_output_cached(drafted)


def test_drafted_in_a_batch_with_others_that_come_and_go(drafted: Law) -> None:
    laws.test_batched_with_others_that_come_and_go(drafted)


def test_drafted_and_preempted(drafted: Law) -> None:
    laws.test_preempted(drafted)


def test_drafted_and_continued_on_another_worker(drafted: Law) -> None:
    laws.test_continued_on_another_worker(9, drafted)


def test_drafted_behind_a_prompt_prefilled_elsewhere(drafted: Law) -> None:
    laws.test_prefilled_elsewhere(47, drafted)


def test_drafted_in_a_crowd_prefilled_elsewhere_that_preempts(drafted: Law) -> None:
    laws.test_prefilled_elsewhere_in_a_crowd_that_preempts(drafted)


def test_drafts_handed_over_with_a_prompt_are_verified_by_the_first_step(drafted: Law) -> None:
    prompt, prefill, decode = drafted.prompt(47), drafted.worker(), drafted.worker()
    first, pages = decode.pull(drafted.request(prompt), prefill)
    drafts = prefill.drafts["r"]
    assert len(drafts) == NUM_DRAFTS
    decode.submit(replace(drafted.request(prompt, output=first), draft_token_ids=drafts), pages)
    while not decode.outputs["r"]:
        decode.step()
    assert decode.engine.draft_counts().verified == (1,) * NUM_DRAFTS
    decode.finish()
    assert first + decode.outputs["r"] == drafted.tokens(prompt)


def test_drafts_that_are_all_wrong_cost_nothing_but_time(drafted: Law) -> None:
    prompt, worker = drafted.prompt(47), drafted.worker()
    wrong = tuple((token + 1) % 211 for token in drafted.tokens(prompt)[:NUM_DRAFTS])
    worker.submit(replace(drafted.request(prompt), draft_token_ids=wrong))
    worker.finish()
    assert worker.outputs["r"] == drafted.tokens(prompt)


@pytest.mark.parametrize("how", [told.test_preempted_amid_a_prompt_and_behind_it, told.test_prefilled_elsewhere])
def test_prompts_are_told_of_beside_drafts(how: Callable[[Law], None], drafted: Law) -> None:
    how(drafted)


def test_prompts_are_told_of_in_chunks_beside_drafts(drafted: Law) -> None:
    told.test_batched_with_others_that_come_and_go(drafted)
    told.test_chunked_at_odd_sizes(7, drafted)
