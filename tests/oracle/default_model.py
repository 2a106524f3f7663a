"""What the oracles of the default model ask it and transformers, all at once: greedy outputs and what is told of
prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shared.engine.api import EngineRequest, SamplingParams
from shared.engine.executor import load_executor
from shared.page_hash import tenant_key
from tests.law.worker import Worker

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
# Of the story's beginnings, and how many tokens follow: few after long ones, which cost a long forward each.
LENGTHS = {63: 8, 64: 8, 65: 8, 128: 8, 257: 6, 400: 6, 1500: 4}
SHORT = 16
NUM_TOP = 5
# By name: of which greedy outputs are asked for, and of which the log-probabilities; the longest is asked for both.
CONTINUED = [*(f"text {i}" for i in range(len(TEXTS))), *(f"story {length}" for length in LENGTHS)]
TOLD = [*(f"told {i}" for i in range(len(TEXTS))), f"story {max(LENGTHS)}"]
MAX_STEP_TOKENS = 200


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and how many are to follow."""

    token_ids: tuple[int, ...]
    num_tokens: int


def prompts(tokenizer: Any) -> dict[str, Prompt]:
    """All that is asked, by name."""
    said = "".join(STORY.format(day, day * 7 % 11, day * 5 % 23) for day in range(1, 80))
    story = tuple(tokenizer.encode(said)[: max(LENGTHS)])
    texts = [tuple(tokenizer.encode(text)) for text in TEXTS]
    stories = [Prompt(story[:length], num_tokens) for length, num_tokens in LENGTHS.items()]
    continued = dict(zip(CONTINUED, [*(Prompt(ids, SHORT) for ids in texts), *stories], strict=True))
    return continued | dict(zip(TOLD, (Prompt(ids, 0) for ids in texts), strict=False))


def answered(model_dir: Path, asked: dict[str, Prompt]) -> Worker:
    """A worker that was asked for everything at once: in batches, in chunks, in pages that nobody shares."""
    executor = load_executor(
        model_dir, model_name="smollm2", dtype="float32", page_size=16, num_threads=2, num_pages=256
    )
    worker = Worker(executor, MAX_STEP_TOKENS)
    for name, prompt in asked.items():
        num_told = NUM_TOP if name in TOLD else None
        sampling = SamplingParams(max_tokens=prompt.num_tokens, ignore_eos=True, num_prompt_logprobs=num_told)
        worker.submit(EngineRequest(name, prompt.token_ids, sampling, hash_key=tenant_key(name)))
    worker.finish()
    return worker


class Expected:
    """transformers' logits of all prompts and their outputs, float32, from one forward: of the longest beginning of the
    story, and behind it of everything else, which sees no more of it than the beginning that it follows."""

    def __init__(self, model: Any, asked: dict[str, Prompt], outputs: dict[str, list[int]]) -> None:
        story = asked[f"story {max(LENGTHS)}"].token_ids
        ids, positions = list(story), list(range(len(story)))
        self._rows: dict[str, list[int]] = {}
        for name in CONTINUED:
            whole = [*asked[name].token_ids, *outputs[name][:-1]]
            num_shared = len(asked[name].token_ids) if name.startswith("story") else 0
            self._rows[name] = [*range(num_shared), *range(len(ids), len(ids) + len(whole) - num_shared)]
            ids += whole[num_shared:]
            positions += range(num_shared, len(whole))
        sees = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        for rows in self._rows.values():
            for i, row in enumerate(rows):
                if row >= len(story):
                    sees[row] = False
                    sees[row, rows[: i + 1]] = True
        with torch.inference_mode():
            self._logits: torch.Tensor = model(
                torch.tensor([ids]), attention_mask=sees[None, None], position_ids=torch.tensor([positions])
            ).logits[0]

    def logits(self, name: str) -> torch.Tensor:
        """[T, vocabulary]: behind each token of a prompt, and of its output, or of what continues it, but the last."""
        return self._logits[self._rows[name.replace("told", "text")]]
