"""The law once more with the weights that people will run."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from shared.engine.api import SamplingParams
from shared.engine.speculation.ngram import NgramProposer
from shared.engine.speculation.speculator import Speculation
from tests.law import conftest
from tests.law import test_prompt_logprobs as told
from tests.law import test_same_tokens as laws
from tests.law.conftest import Law, behind, default_model

# Fewer than small models say, whose steps take less: enough for prompts of two pages to grow by two.
GREEDY, SAMPLED = (replace(each, max_tokens=20) for each in (conftest.GREEDY, conftest.SAMPLED))


@pytest.fixture(scope="module")
def law() -> Law:
    """Greedy; what is right is asked once, whatever is chosen how."""
    return Law(default_model()[1], GREEDY)


def sampled(law: Law) -> Law:
    return replace(law, sampling=SAMPLED)


def ahead(law: Law) -> Law:
    return replace(
        law, make_executor=lambda num_pages: behind(law.make_executor(num_pages)), in_order=law.make_executor
    )


def test_prefilled_elsewhere_in_a_crowd_that_preempts(law: Law) -> None:
    laws.test_prefilled_elsewhere_in_a_crowd_that_preempts(law)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafted_from_the_text_so_far(sampling: SamplingParams, law: Law) -> None:
    drafting = Speculation(num_drafts=5, make_proposer=NgramProposer)
    law = replace(law, sampling=sampling, speculation=drafting)
    prompt, worker = law.prompt(10) * 4, law.worker()
    assert worker.run(law.request(prompt)) == law.tokens(prompt)
    assert sum(worker.engine.draft_counts().verified) > 0


@pytest.mark.parametrize(
    ("how", "sampling"),
    [(laws.test_batched_with_others_that_come_and_go, SAMPLED), (laws.test_preempted, GREEDY)],
    ids=["batched and sampled", "preempted and greedy"],
)
def test_launched_behind_the_step_before(how: Callable[[Law], None], sampling: SamplingParams, law: Law) -> None:
    """The small models do the other two."""
    how(ahead(replace(law, sampling=sampling)))


def test_sampled_in_chunks_of_an_odd_size(law: Law) -> None:
    laws.test_chunked_at_odd_sizes(17, sampled(law))


def test_sampled_and_continued_on_another_worker(law: Law) -> None:
    laws.test_continued_on_another_worker(9, sampled(law))


@pytest.mark.parametrize(
    "how", [told.test_preempted_amid_a_prompt_and_behind_it, told.test_prefilled_elsewhere_in_part]
)
def test_prompts_are_told_of(how: Callable[[Law], None], law: Law) -> None:
    how(law)


def test_prompts_are_told_of_where_steps_are_launched_ahead(law: Law) -> None:
    told.test_batched_with_others_that_come_and_go(ahead(sampled(law)))
