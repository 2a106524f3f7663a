"""The native kernels against their torch twin, and against themselves where results must not differ at all."""

import random
from itertools import count
from pathlib import Path

import pytest
import torch

from shared.engine import batch
from shared.engine.kernels import build
from shared.engine.models import llama
from shared.engine.models.api import Placement
from tests.oracle import driver, tiny_models

PAGE_SIZE = driver.PAGE_SIZE
pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++")


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed * 1000 + length).choices(range(3, 211), k=length)


class Bench:
    """A model over a pool whose every byte is set, as if other sequences had used it before."""

    def __init__(self, model_dir: Path, kernels: str, dtype: torch.dtype = torch.float32, num_threads: int = 1) -> None:
        self.model = llama.load(model_dir, Placement(dtype, num_threads, kernels))
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


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_the_torch_twin(variant: str, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_models.write(variant, tmp_path)
    native, twin = (Bench(tmp_path, kernels).last_logits(prompt(70)) for kernels in ("native", "torch"))
    if dtype == torch.bfloat16:
        native = Bench(tmp_path, "native", dtype).last_logits(prompt(70))
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype] * float(twin.abs().max())
    torch.testing.assert_close(native, twin, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 5, 13, 32, 49])
def test_logits_are_equal_to_the_bit_however_a_prompt_is_chunked(
    chunk: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_models.write("llama", tmp_path)
    bench = Bench(tmp_path, "native", dtype)
    assert torch.equal(bench.last_logits(prompt(110), chunk), bench.last_logits(prompt(110)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_sequences", range(2, 20))
def test_logits_are_equal_to_the_bit_in_any_batch(num_sequences: int, dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_models.write("qwen3", tmp_path)
    bench = Bench(tmp_path, "native", dtype)
    prompts = [prompt(1 + 3 * index, seed=2) for index in range(num_sequences)]
    alone = [bench.last_logits(each) for each in prompts]
    pages = count()
    runs = [driver.Run(each, pages) for each in prompts]
    for run in runs[1:]:
        run.chunk = len(run.tokens) - 1
    bench.logits(runs[1:])
    assert torch.equal(bench.logits(runs), torch.stack(alone))


@pytest.mark.parametrize("num_threads", [2, 3, 5])
def test_logits_are_equal_to_the_bit_on_any_number_of_threads(num_threads: int, tmp_path: Path) -> None:
    tiny_models.write("llama-biases", tmp_path)
    one, several = (Bench(tmp_path, "native", num_threads=n).last_logits(prompt(150)) for n in (1, num_threads))
    assert torch.equal(one, several)
