"""The default model through the whole engine, float32: every greedy token equals transformers'."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from shared.engine.api import EngineRequest, SamplingParams, TokensSampled
from shared.engine.engine import Engine
from shared.engine.executor import load_executor
from shared.engine.kv.store import KvStore
from shared.page_hash import tenant_key

TEXTS = [
    "The",
    "Paris is",
    "1, 1, 2, 3, 5, 8, 13,",
    "def fibonacci(n: int) -> int:\n    ",
    "Il était une fois, dans un pays lointain,",
    "日本の首都は",
    "SELECT name, COUNT(*) FROM",
    "🙂🙂🙂 means",
    "    \n\n\t\n",
    "#include <stdio.h>\nint main(void) {\n\tprintf(",
    '{"name": "Ada", "born": 1815, "known for": [',
    "Water boils at 100 degrees Celsius. Water freezes at",
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n",
]
STORY = "On day {0} the crew of the ship counted {0} gulls, {1} whales and wrote: 'all is well, wind {2} knots'. "
LENGTHS = {63: 8, 64: 8, 65: 8, 128: 8, 257: 6, 400: 6, 777: 4, 1024: 4, 1500: 4}
SHORT = 16


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[tuple[list[int], int]]:
    """Token ids and how many to generate: few after long prompts, which cost a long forward each."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    story = tokenizer.encode("".join(STORY.format(day, day * 7 % 11, day * 5 % 23) for day in range(1, 80)))
    short = [(tokenizer.encode(text), SHORT) for text in TEXTS]
    return short + [(story[-length:], count) for length, count in LENGTHS.items()]


@pytest.fixture(scope="module")
def outputs(smollm2: Path, prompts: list[tuple[list[int], int]]) -> list[list[int]]:
    """What the engine answers when all prompts come at once: in batches, in chunks, in pages."""
    executor = load_executor(smollm2, model_name="smollm2", dtype="float32", page_size=16, num_threads=2, num_pages=512)
    engine = Engine(
        executor, KvStore(executor.spec.num_pages, 16, lease_ttl_ms=10_000), max_step_tokens=512, max_num_sequences=16
    )
    for index, (prompt, count) in enumerate(prompts):
        sampling = SamplingParams(max_tokens=count, ignore_eos=True)
        engine.submit(EngineRequest(str(index), tuple(prompt), sampling, hash_key=tenant_key("oracle")))
    found: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    while engine.has_work():
        for event in engine.step():
            assert isinstance(event, TokensSampled)
            found[event.request_id] += [token.token_id for token in event.tokens]
    return list(found.values())


@pytest.fixture(scope="module")
def oracle(smollm2: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


def most_likely_after(oracle: Any, prompt: Sequence[int], output: Sequence[int]) -> list[int]:
    """For every token of the output, what transformers holds most likely. If all agree, it is greedy."""
    ids = torch.tensor([[*prompt, *output[:-1]]])
    with torch.inference_mode():
        logits = oracle(ids, logits_to_keep=len(output)).logits[0]
    return logits.argmax(-1).tolist()  # type: ignore[no-any-return]


def test_the_prompts_are_many_and_of_all_lengths(prompts: list[tuple[list[int], int]]) -> None:
    lengths = [len(prompt) for prompt, _ in prompts]
    assert (len(lengths) >= 20, min(lengths), max(lengths)) == (True, 1, 1500)


@pytest.mark.parametrize("index", range(len(TEXTS) + len(LENGTHS)))
def test_greedy_tokens_equal_transformers(
    index: int, prompts: list[tuple[list[int], int]], outputs: list[list[int]], oracle: Any
) -> None:
    prompt, count = prompts[index]
    assert len(outputs[index]) == count
    assert outputs[index] == most_likely_after(oracle, prompt, outputs[index])
