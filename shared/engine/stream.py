"""Running a model over one sequence of tokens, without an engine around it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import build
from shared.engine.kv.memory import HostMemory
from shared.engine.kv.view import pool_bytes
from shared.engine.models.api import Model

PAGE_SIZE, CHUNK_TOKENS = 16, 128


class Stream:
    """A sequence of at most `max_tokens` tokens, in pages of its own in host memory."""

    def __init__(self, model: Model, max_tokens: int) -> None:
        self._model, self._layout = model, model.rank_layout(PAGE_SIZE)
        memory = HostMemory(self._layout.num_pages(max_tokens), self._layout.page_bytes)
        self._pool, self._pages, self._end = pool_bytes(memory), list(range(memory.num_pages)), 0

    def extend(self, tokens: Sequence[int], *, last: bool = False) -> torch.Tensor:
        """Logits float32 [len(tokens), vocab_size] behind each of the next tokens, computed in one step; with `last`
        behind the last one alone."""
        item = BatchItem("stream", tokens, self._end, self._pages, True, SamplingParams(), self._end)
        batch = build([item], PAGE_SIZE)
        if not last:
            batch = replace(batch, sampled_rows=torch.arange(len(tokens), dtype=torch.int32))
        self._end += len(tokens)
        with torch.inference_mode():
            return self._model.forward(batch, self._pool, self._layout)[:, : self._model.vocab_size]


def logits(model: Model, tokens: Sequence[int], *, last: bool = False) -> Iterator[torch.Tensor]:
    """Logits of consecutive tokens as in `Stream.extend`, a bounded number of tokens at a time."""
    stream = Stream(model, len(tokens))
    for start in range(0, len(tokens), CHUNK_TOKENS):
        yield stream.extend(tokens[start : start + CHUNK_TOKENS], last=last)


def greedy(model: Model, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The most likely tokens behind `prompt`, one after the other; none of them ends it."""
    stream, output = Stream(model, len(prompt) + num_tokens), list[int]()
    found = stream.extend(prompt, last=True)
    while True:
        output.append(int(found[-1].argmax()))
        if len(output) == num_tokens:
            return output
        found = stream.extend(output[-1:], last=True)


def all_logits(model: Model, tokens: Sequence[int]) -> torch.Tensor:
    """Logits float32 [len(tokens), vocab_size] behind each of a sequence's tokens, computed in one step."""
    return Stream(model, len(tokens)).extend(tokens)
