"""Logits of every position of one prompt, straight from a model."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from shared.engine.api import BatchItem, SamplingParams
from shared.engine.batch import build
from shared.engine.kv.memory import HostMemory
from shared.engine.kv.view import pool_bytes
from shared.engine.models.api import Model

PAGE_SIZE = 16


def all_logits(model: Model, prompt: Sequence[int]) -> torch.Tensor:
    """float32 [len(prompt), vocab_size]: the prompt in one step, each of its tokens a row that is sampled."""
    layout = model.layout(PAGE_SIZE)
    memory = HostMemory(layout.num_pages(len(prompt)), layout.page_bytes)
    pages = list(range(memory.num_pages))
    batch = build([BatchItem("all", prompt, 0, pages, True, SamplingParams(), len(prompt))], PAGE_SIZE)
    batch = replace(batch, sampled_rows=torch.arange(len(prompt), dtype=torch.int32))
    with torch.inference_mode():
        return model.forward(batch, pool_bytes(memory), layout)
