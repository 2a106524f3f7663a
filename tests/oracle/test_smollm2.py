"""The default model through the whole engine, float32: every greedy token equals transformers'."""

import pytest

from tests.law.worker import Worker
from tests.oracle.default_model import CONTINUED, Expected, Prompt


def test_the_prompts_are_many_and_of_all_lengths(smollm2_prompts: dict[str, Prompt]) -> None:
    lengths = [len(smollm2_prompts[name].token_ids) for name in CONTINUED]
    assert (len(lengths) >= 20, min(lengths), max(lengths)) == (True, 1, 1500)


@pytest.mark.parametrize("name", CONTINUED)
def test_greedy_tokens_equal_transformers(
    name: str, smollm2_prompts: dict[str, Prompt], smollm2_answers: Worker, smollm2_expected: Expected
) -> None:
    """Each token of the output is the most likely one after those before it: if all are, it is greedy."""
    output = smollm2_answers.outputs[name]
    assert len(output) == smollm2_prompts[name].num_tokens
    assert output == smollm2_expected.logits(name)[-len(output) :].argmax(-1).tolist()
