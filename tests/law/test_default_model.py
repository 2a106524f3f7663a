"""The law once more with the weights that people will run."""

from collections.abc import Callable

import pytest

from shared.engine.api import SamplingParams
from shared.engine.speculation.ngram import NgramProposer
from shared.engine.speculation.speculator import Speculation
from tests.law import test_prompt_logprobs as told
from tests.law import test_same_tokens as laws
from tests.law.conftest import GREEDY, SAMPLED, Law, MakeExecutor, behind, default_model


@pytest.fixture(scope="module")
def make_executor() -> MakeExecutor:
    return default_model()[1]


def test_prefilled_elsewhere_in_a_crowd_that_preempts(make_executor: MakeExecutor) -> None:
    laws.test_prefilled_elsewhere_in_a_crowd_that_preempts(Law(make_executor, GREEDY))


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_drafted_from_the_text_so_far(sampling: SamplingParams, make_executor: MakeExecutor) -> None:
    law = Law(make_executor, sampling, speculation=Speculation(num_drafts=5, make_proposer=NgramProposer))
    prompt, worker = law.prompt(10) * 4, law.worker()
    assert worker.run(law.request(prompt)) == law.tokens(prompt)
    assert sum(worker.engine.draft_counts().verified) > 0


@pytest.mark.parametrize(
    ("how", "sampling"),
    [(laws.test_batched_with_others_that_come_and_go, SAMPLED), (laws.test_preempted, GREEDY)],
    ids=["batched and sampled", "preempted and greedy"],
)
def test_launched_behind_the_step_before(
    how: Callable[[Law], None], sampling: SamplingParams, make_executor: MakeExecutor
) -> None:
    """The small models do the other two."""
    how(Law(lambda num_pages: behind(make_executor(num_pages)), sampling, in_order=make_executor))


def test_sampled_in_chunks_of_an_odd_size(make_executor: MakeExecutor) -> None:
    laws.test_chunked_at_odd_sizes(17, Law(make_executor, SAMPLED))


def test_sampled_and_continued_on_another_worker(make_executor: MakeExecutor) -> None:
    laws.test_continued_on_another_worker(9, Law(make_executor, SAMPLED))


@pytest.mark.parametrize(
    "how", [told.test_preempted_amid_a_prompt_and_behind_it, told.test_prefilled_elsewhere_in_part]
)
def test_prompts_are_told_of(how: Callable[[Law], None], make_executor: MakeExecutor) -> None:
    how(Law(make_executor, GREEDY))


def test_prompts_are_told_of_where_steps_are_launched_ahead(make_executor: MakeExecutor) -> None:
    ahead = Law(lambda num_pages: behind(make_executor(num_pages)), SAMPLED, in_order=make_executor)
    told.test_batched_with_others_that_come_and_go(ahead)
