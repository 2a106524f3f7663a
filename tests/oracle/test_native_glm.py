"""GLM's native layers against their torch twin, and against themselves where results must not differ at all."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.engine.kernels import build
from shared.engine.layers import native_glm
from shared.engine.models import glm, glm_config
from tests.oracle import native_bench, tiny_glm
from tests.oracle.native_bench import prompt

DTYPES = [torch.float32, torch.bfloat16]
VOCABULARY = {"vocab_size": 211, "eos_token_id": [2], "pad_token_id": 2}
# What differs from three layers of tiny_glm, by what it tries.
SHAPES: dict[str, dict[str, Any]] = {
    "8 of the visible tokens": {},
    "several spans of tokens": {"index_topk": 70},
    "all tokens": {"index_topk": 512},
    "more heads than one pass takes": {"num_attention_heads": 50, "num_key_value_heads": 50},
    "groups of experts": {"n_group": 4, "topk_group": 2, "n_routed_experts": 16, "num_experts_per_tok": 3},
    "weights of experts as they are": {"norm_topk_prob": False},
    "no whole panels": {
        "hidden_size": 72,
        "kv_lora_rank": 48,
        "q_lora_rank": 40,
        "v_head_dim": 20,
        "moe_intermediate_size": 37,
        "intermediate_size": 75,
    },
}
Bench = partial(native_bench.Bench, glm.load)
pytestmark = pytest.mark.skipif(build.compiler() is None, reason="needs g++")


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    dirs = {name: tmp_path_factory.mktemp("glm") for name in SHAPES}
    for name, path in dirs.items():
        tiny_glm.write(path, **(tiny_glm.FEW_LAYERS | VOCABULARY | SHAPES[name]))
    return dirs


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_the_torch_twin(shape: str, model_dirs: dict[str, Path]) -> None:
    assert native_glm.obstacle(glm_config.read(model_dirs[shape]), torch.bfloat16, "bfloat16") is None
    native, twin = (Bench(model_dirs[shape], kernels).last_logits(prompt(90)) for kernels in ("native", "torch"))
    torch.testing.assert_close(native, twin, rtol=0, atol=5e-5 * float(twin.abs().max()))


@pytest.mark.parametrize("shape", ["all tokens", "no whole panels"])
def test_logits_in_bfloat16_are_nearly_those_of_float32(shape: str, model_dirs: dict[str, Path]) -> None:
    """Within the first tokens, which are all selected: a choice of few may turn on a rounding."""
    native = Bench(model_dirs[shape], "native", torch.bfloat16).last_logits(prompt(8))
    exact = Bench(model_dirs[shape], "torch").last_logits(prompt(8))
    torch.testing.assert_close(native, exact, rtol=0, atol=0.1 * float(exact.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("chunk", [1, 13, 49])
def test_logits_are_equal_to_the_bit_however_a_prompt_is_chunked(
    chunk: int, dtype: torch.dtype, model_dirs: dict[str, Path]
) -> None:
    bench = Bench(model_dirs["several spans of tokens"], "native", dtype)
    assert torch.equal(bench.last_logits(prompt(110), chunk), bench.last_logits(prompt(110)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_sequences", [2, 3, 7, 13, 19])
def test_logits_are_equal_to_the_bit_in_any_batch(
    num_sequences: int, dtype: torch.dtype, model_dirs: dict[str, Path]
) -> None:
    bench = Bench(model_dirs["groups of experts"], "native", dtype)
    prompts = [prompt(1 + 3 * index, seed=2) for index in range(num_sequences)]
    alone = [bench.last_logits(each) for each in prompts]
    assert torch.equal(bench.batched_logits(prompts), torch.stack(alone))


@pytest.mark.parametrize("num_threads", [2, 3, 5])
def test_logits_are_equal_to_the_bit_on_any_number_of_threads(num_threads: int, model_dirs: dict[str, Path]) -> None:
    path = model_dirs["8 of the visible tokens"]
    one, several = (Bench(path, "native", num_threads=n).last_logits(prompt(150)) for n in (1, num_threads))
    assert torch.equal(one, several)


@pytest.mark.parametrize(
    ("changes", "dtype", "kv_format", "said"),
    [
        ({}, torch.float32, "fp8", "pages in fp8"),
        ({}, torch.float32, "bfloat16", "pages in bfloat16"),
        ({"kv_lora_rank": 40}, torch.float32, "float32", "latents of 40"),
        ({"v_head_dim": 31}, torch.bfloat16, "bfloat16", "odd"),
        ({"qk_rope_head_dim": 32}, torch.float32, "float32", "a rotary dimension of 32"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(
    changes: dict[str, Any], dtype: torch.dtype, kv_format: str, said: str
) -> None:
    config = glm_config.parse(tiny_glm.FIELDS | {"architectures": [glm_config.ARCHITECTURE]} | changes)
    assert said in str(native_glm.obstacle(config, dtype, kv_format))
