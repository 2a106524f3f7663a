"""Log-probabilities of prompts through the whole engine, float32: those of transformers, and the most likely tokens."""

import pytest
import torch

from tests.law.worker import Worker
from tests.oracle.default_model import NUM_TOP, TOLD, Expected, Prompt

# Two ways to add up float32 in a model of 30 layers; logits are some 20.
BOUND = 2e-4


@pytest.mark.parametrize("name", TOLD)
def test_log_probabilities_equal_transformers(
    name: str, smollm2_prompts: dict[str, Prompt], smollm2_answers: Worker, smollm2_expected: Expected
) -> None:
    prompt, found = smollm2_prompts[name].token_ids, smollm2_answers.told[name]
    rows = torch.log_softmax(smollm2_expected.logits(name)[: len(prompt) - 1], dim=-1)
    following = torch.tensor(prompt[1:])[:, None]
    expected = rows.gather(1, following)
    assert len(found) == len(prompt) - 1
    logprobs = torch.tensor([each.logprob for each in found])[:, None]
    assert torch.allclose(logprobs, expected, rtol=0, atol=BOUND)
    # A rank counts those that are likelier: as many as are so beyond the bound, at least, and at most within it.
    ranks = torch.tensor([each.rank for each in found])
    assert bool((ranks >= 1 + (rows > expected + 2 * BOUND).sum(dim=1)).all())
    assert bool((ranks <= 1 + (rows > expected - 2 * BOUND).sum(dim=1)).all())
    tops = torch.tensor([[value for _, value in each.top] for each in found]).view(-1, NUM_TOP)
    ids = torch.tensor([[token_id for token_id, _ in each.top] for each in found], dtype=torch.int64).view(-1, NUM_TOP)
    assert torch.allclose(tops, rows.topk(NUM_TOP, dim=1).values, rtol=0, atol=BOUND)
    assert torch.allclose(tops, rows.gather(1, ids), rtol=0, atol=BOUND)
