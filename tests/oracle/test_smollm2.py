"""The default model through the whole engine, float32: every greedy token equals transformers'."""

from copy import deepcopy
from typing import Any

import pytest
import torch

from tests.law.worker import Worker
from tests.oracle.default_model import CONTINUED, LENGTHS, Prompt


@pytest.fixture(scope="module")
def story(smollm2_prompts: dict[str, Prompt], smollm2_oracle: Any) -> Any:
    """What transformers keeps of the longest beginning of the story: of every other one a part of it."""
    longest = smollm2_prompts[f"story {max(LENGTHS)}"].token_ids
    with torch.inference_mode():
        return smollm2_oracle(torch.tensor([longest]), use_cache=True, logits_to_keep=1).past_key_values


def most_likely_after(oracle: Any, ids: list[int], num_last: int, kept: Any = None) -> list[int]:
    """What transformers holds most likely behind each of the last of these tokens, which follow those that are kept."""
    with torch.inference_mode():
        logits = oracle(torch.tensor([ids]), past_key_values=kept, logits_to_keep=num_last).logits[0]
    return logits.argmax(-1).tolist()  # type: ignore[no-any-return]


def test_the_prompts_are_many_and_of_all_lengths(smollm2_prompts: dict[str, Prompt]) -> None:
    lengths = [len(smollm2_prompts[name].token_ids) for name in CONTINUED]
    assert (len(lengths) >= 20, min(lengths), max(lengths)) == (True, 1, 1100)


@pytest.mark.parametrize("name", CONTINUED)
def test_greedy_tokens_equal_transformers(
    name: str, smollm2_prompts: dict[str, Prompt], smollm2_answers: Worker, smollm2_oracle: Any, story: Any
) -> None:
    """After every token of the output the next one is the most likely: if all agree, it is greedy."""
    prompt, output = list(smollm2_prompts[name].token_ids), smollm2_answers.outputs[name]
    assert len(output) == smollm2_prompts[name].num_tokens
    if not name.startswith("story"):
        assert output == most_likely_after(smollm2_oracle, prompt + output[:-1], len(output))
        return
    kept = deepcopy(story)
    kept.crop(len(prompt) - 1)
    assert output == most_likely_after(smollm2_oracle, prompt[-1:] + output[:-1], len(output), kept)
