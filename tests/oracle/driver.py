"""Runs an executor by hand: what the engine does, with every choice of chunks and pages in the test's hands."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from shared.engine.api import BatchItem, SamplingParams
from shared.engine.executor import TorchExecutor, load_executor

PAGE_SIZE = 16


def load(
    model_dir: Path, dtype: str = "float32", num_pages: int = 64, kernels: str = "auto", kv_dtype: str = "auto"
) -> TorchExecutor:
    return load_executor(
        model_dir,
        model_name="tiny",
        dtype=dtype,
        page_size=PAGE_SIZE,
        num_threads=1,
        num_pages=num_pages,
        kernels=kernels,
        kv_dtype=kv_dtype,
    )


class Run:
    """One sequence: its tokens so far, how many are computed, and its pages (taken from a shared counter)."""

    def __init__(
        self,
        prompt: Sequence[int],
        pages: Iterator[int],
        chunk: int = 10_000,
        sampling: SamplingParams | None = None,
    ) -> None:
        self.sampling = sampling or SamplingParams()
        self.tokens = list(prompt)
        self.num_prompt = len(prompt)
        self.num_computed = 0
        self.chunk = chunk
        self._pages = pages
        self._page_ids: list[int] = []

    @property
    def output(self) -> list[int]:
        return self.tokens[self.num_prompt :]

    def item(self) -> BatchItem:
        """The next part: at most `chunk` tokens; sampled if it reaches the end."""
        end = min(len(self.tokens), self.num_computed + self.chunk)
        while len(self._page_ids) * PAGE_SIZE < end:
            self._page_ids.append(next(self._pages))
        part = self.tokens[self.num_computed : end]
        last = end == len(self.tokens)
        pages, history = list(self._page_ids), list(self.tokens)
        return BatchItem("run", part, self.num_computed, pages, last, self.sampling, self.num_prompt, history)


def step(executor: TorchExecutor, runs: Sequence[Run]) -> None:
    """One forward over all runs."""
    items = [run.item() for run in runs]
    for run, item, chosen in zip(runs, items, executor.forward(items), strict=True):
        run.num_computed += len(item.token_ids)
        if chosen is not None:
            run.tokens.append(chosen.tokens[0].token_id)


def generate(
    executor: TorchExecutor,
    prompt: Sequence[int],
    num_tokens: int,
    chunk: int = 10_000,
    sampling: SamplingParams | None = None,
) -> list[int]:
    """Tokens of one sequence alone, greedy if not told otherwise, its prompt in chunks of `chunk`, its pages in falling
    order."""
    run = Run(prompt, iter(range(executor.spec.num_pages - 1, -1, -1)), chunk, sampling)
    while len(run.output) < num_tokens:
        step(executor, [run])
    return run.output


def generate_together(executor: TorchExecutor, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """Greedy tokens of several sequences in one batch, each with a chunk size of its own, so that parts of prompts and
    single tokens meet in a step."""
    pages = count()
    runs = [Run(prompt, pages, chunk=5 + 6 * index) for index, prompt in enumerate(prompts)]
    while unfinished := [run for run in runs if len(run.output) < num_tokens]:
        step(executor, unfinished)
    return [run.output for run in runs]
