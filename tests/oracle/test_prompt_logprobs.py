"""Log-probabilities of prompts through the whole engine, float32: those of transformers, and the most likely tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shared.engine.api import EngineRequest, SamplingParams
from shared.engine.executor import load_executor
from shared.page_hash import tenant_key
from tests.law.worker import Worker
from tests.oracle.test_smollm2 import STORY, TEXTS

NUM_TOP = 5
# Two ways to add up float32 in a model of 30 layers; logits are some 20.
BOUND = 2e-4


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    """Token ids of texts, and of a story longer than a step."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    story = tokenizer.encode("".join(STORY.format(day, day * 7 % 11, day * 5 % 23) for day in range(1, 40)))
    return [*(tokenizer.encode(text) for text in TEXTS), story[:777]]


@pytest.fixture(scope="module")
def worker(smollm2: Path, prompts: list[list[int]]) -> Worker:
    """One that was asked for all of them at once: in batches, in chunks, in pages."""
    made = Worker(
        load_executor(smollm2, model_name="smollm2", dtype="float32", page_size=16, num_threads=2, num_pages=256), 200
    )
    sampling = SamplingParams(max_tokens=0, num_prompt_logprobs=NUM_TOP)
    for index, prompt in enumerate(prompts):
        made.submit(EngineRequest(str(index), tuple(prompt), sampling, hash_key=tenant_key("oracle")))
    made.finish()
    return made


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.mark.parametrize("index", range(len(TEXTS) + 1))
def test_log_probabilities_equal_transformers(
    index: int, prompts: list[list[int]], worker: Worker, oracle: Any
) -> None:
    prompt, found = prompts[index], worker.told[str(index)]
    with torch.inference_mode():
        rows = torch.log_softmax(oracle(torch.tensor([prompt])).logits[0, :-1], dim=-1)
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
