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


def logits(
    model: Model, tokens: Sequence[int], *, chunk: int = CHUNK_TOKENS, last: bool = False
) -> Iterator[torch.Tensor]:
    """Logits float32 [up to `chunk`, vocab_size] of consecutive tokens, in steps that share the sequence's pages.

    With `last` only those of each step's last token, [1, vocab_size], for when they are of no interest.
    """
    layout = model.rank_layout(PAGE_SIZE)
    memory = HostMemory(layout.num_pages(len(tokens)), layout.page_bytes)
    pool, pages = pool_bytes(memory), list(range(memory.num_pages))
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        batch = build([BatchItem("stream", part, start, pages, True, SamplingParams(), len(tokens))], PAGE_SIZE)
        if not last:
            batch = replace(batch, sampled_rows=torch.arange(len(part), dtype=torch.int32))
        with torch.inference_mode():
            yield model.forward(batch, pool, layout)[:, : model.vocab_size]
