"""Models with our own kernels and with torch's, over pools that were used before."""

import random
from collections.abc import Callable
from itertools import count
from pathlib import Path

import torch

from shared.engine import batch
from shared.engine.models.api import Model, Placement
from tests.oracle import driver
from tests.oracle.driver import PAGE_SIZE

Load = Callable[[Path, Placement], Model]


def prompt(length: int, seed: int = 0) -> list[int]:
    """Tokens of a vocabulary of 211."""
    return random.Random(seed * 1000 + length).choices(range(3, 211), k=length)


class Bench:
    """A model over a pool whose every byte is set, as if other sequences had used it before."""

    def __init__(
        self, load: Load, model_dir: Path, kernels: str, dtype: torch.dtype = torch.float32, num_threads: int = 1
    ) -> None:
        self.model = load(model_dir, Placement(dtype, num_threads, kernels))
        self.layout = self.model.layout(PAGE_SIZE)
        self.pool = torch.full((128, self.layout.page_bytes), 0xFF, dtype=torch.uint8)  # NaN in either dtype

    def logits(self, runs: list[driver.Run]) -> torch.Tensor:
        """Logits of the next parts of `runs`."""
        items = [run.item() for run in runs]
        for run, item in zip(runs, items, strict=True):
            run.num_computed += len(item.token_ids)
        with torch.inference_mode():
            return self.model.forward(batch.build(items, PAGE_SIZE), self.pool, self.layout)

    def last_logits(self, tokens: list[int], chunk: int = 10_000) -> torch.Tensor:
        """Logits after `tokens`, computed in chunks."""
        run = driver.Run(tokens, count(), chunk)
        while len(logits := self.logits([run])) == 0:
            pass
        return logits[0]

    def batched_logits(self, prompts: list[list[int]]) -> torch.Tensor:
        """Logits after each of several prompts, whose last tokens are computed together, and the first one whole."""
        pages = count()
        runs = [driver.Run(each, pages) for each in prompts]
        for run in runs[1:]:
            run.chunk = len(run.tokens) - 1
        self.logits(runs[1:])
        return self.logits(runs)
