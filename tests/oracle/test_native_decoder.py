"""The native kernels against their torch twin, and against themselves where results must not differ at all."""

from functools import partial
from pathlib import Path

import pytest
import torch

from shared.engine.kernels import build
from shared.engine.models import llama
from tests.oracle import native_bench, tiny_models
from tests.oracle.native_bench import prompt

Bench = partial(native_bench.Bench, llama.load)
pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++")


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
    assert torch.equal(bench.batched_logits(prompts), torch.stack(alone))


@pytest.mark.parametrize("num_threads", [2, 3, 5])
def test_logits_are_equal_to_the_bit_on_any_number_of_threads(num_threads: int, tmp_path: Path) -> None:
    tiny_models.write("llama-biases", tmp_path)
    one, several = (Bench(tmp_path, "native", num_threads=n).last_logits(prompt(150)) for n in (1, num_threads))
    assert torch.equal(one, several)
