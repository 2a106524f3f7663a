"""GLM-5.2 against transformers, float32: latent attention, shared sparse selection, mixture of experts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.engine.models import glm
from shared.engine.models.api import Placement
from shared.engine.stream import all_logits
from shared.errors import Unsupported
from tests.oracle import driver, tiny_glm, tiny_models

GOLDEN_PROMPT = [token * 37 % 500 for token in range(7, 55)]
GOLDEN = [403, 480, 65, 486, 503, 189, 265, 22, 309, 25, 99, 443, 244, 234, 209, 280]


@pytest.fixture(scope="module")
def oracle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("glm")
    tiny_glm.write(path)
    return path


def logits(model_dir: Path, prompt: list[int]) -> torch.Tensor:
    return all_logits(glm.load(model_dir, Placement(torch.float32, 1)), prompt)


def oracle_logits(model: Any, prompt: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = model(torch.tensor([prompt])).logits[0]
    return answer


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_the_golden_tokens_are_reproduced(kernels: str, oracle_dir: Path) -> None:
    assert driver.generate(driver.load(oracle_dir, kernels=kernels), GOLDEN_PROMPT, len(GOLDEN)) == GOLDEN
    first = logits(oracle_dir, GOLDEN_PROMPT)[-1, :4]
    assert first.tolist() == pytest.approx([1.33392, -1.13537, -0.32356, -1.18977], abs=1e-4)


@pytest.mark.parametrize("length", [1, 8, 9, 64, 200])
def test_logits_of_every_position_equal_transformers(length: int, oracle_dir: Path) -> None:
    prompt = [token * 91 % 500 for token in range(3, 3 + length)]
    torch.testing.assert_close(logits(oracle_dir, prompt), oracle_logits(tiny_glm.make(), prompt), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"index_topk_freq": 1},
        {"indexer_types": ["full", "shared", "full", "full", "shared", "shared", "full"]},
        {"n_group": 4, "topk_group": 2},
        {"norm_topk_prob": False, "n_shared_experts": 2},
        {"index_topk": 4096},
    ],
    ids=["every layer selects", "indexer_types", "groups of experts", "two shared experts", "dense"],
)
def test_variants_equal_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_glm.write(tmp_path, **changes)
    prompt = GOLDEN_PROMPT * 2
    torch.testing.assert_close(logits(tmp_path, prompt), oracle_logits(model, prompt), atol=1e-4, rtol=0)


def test_the_selection_is_felt_from_the_first_token_that_cannot_see_all(oracle_dir: Path, tmp_path: Path) -> None:
    tiny_glm.write(tmp_path, index_topk=4096)
    sparse, dense = logits(oracle_dir, GOLDEN_PROMPT), logits(tmp_path, GOLDEN_PROMPT)
    differing = ((sparse - dense).abs().amax(-1) > 1e-3).nonzero().flatten()
    assert int(differing[0]) == tiny_glm.FIELDS["index_topk"]


@pytest.mark.parametrize("chunk", [1, 7, 16, 33])
def test_tokens_do_not_depend_on_the_chunks_of_the_prompt(chunk: int, oracle_dir: Path) -> None:
    assert driver.generate(driver.load(oracle_dir), GOLDEN_PROMPT, len(GOLDEN), chunk) == GOLDEN


def test_tokens_do_not_depend_on_the_other_sequences_of_a_batch(oracle_dir: Path) -> None:
    executor = driver.load(oracle_dir, num_pages=128)
    prompts = [GOLDEN_PROMPT, [5], GOLDEN_PROMPT[::-1] * 3, [9] * 17]
    alone = [driver.generate(executor, prompt, 12) for prompt in prompts]
    assert driver.generate_together(executor, prompts, 12) == alone


def test_a_page_holds_every_state_class_and_sharing_layers_keep_no_index_keys(oracle_dir: Path) -> None:
    latents, keys = driver.load(oracle_dir).spec.layout.state_classes
    assert (latents.name, latents.num_layers, latents.size_bytes) == ("mla_latent", 7, 7 * 16 * 40 * 4)
    assert (keys.name, keys.num_layers, keys.size_bytes) == ("indexer_keys", 4, 4 * 16 * 16 * 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_parameters": None}, "rope_parameters"),
        ({"indexer_types": ["shared"] * 7}, "first layer"),
        ({"indexer_types": ["full"] * 3}, "each of 7 layers"),
        ({"scoring_func": "softmax"}, "sigmoid"),
        ({"rope_interleave": False}, "halves paired"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method 'awq'"),
        ({"num_hidden_layers": 8, "mlp_layer_types": None, "indexer_types": None}, r"missing model\.layers\.7"),
    ],
)
def test_what_cannot_be_honoured_is_named(
    changes: dict[str, Any], message: str, oracle_dir: Path, tmp_path: Path
) -> None:
    fields = json.loads((oracle_dir / "config.json").read_text()) | changes
    fields = {name: value for name, value in fields.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    (tmp_path / "model.safetensors").symlink_to(oracle_dir / "model.safetensors")
    with pytest.raises(Unsupported, match=message):
        driver.load(tmp_path)


def test_greedy_tokens_equal_transformers_far_beyond_the_selection(tmp_path: Path) -> None:
    model = tiny_glm.write(tmp_path, seed=5)
    prompt = [token * 17 % 499 for token in range(400)]
    expected = tiny_models.greedy_tokens(model, prompt, 8)
    for kernels in ("auto", "torch"):
        assert driver.generate(driver.load(tmp_path, kernels=kernels), prompt, 8, chunk=100) == expected


def test_without_a_compiler_torch_chooses_the_tokens(
    oracle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert driver.generate(driver.load(oracle_dir), GOLDEN_PROMPT, len(GOLDEN)) == GOLDEN
    with pytest.raises(Unsupported, match=r"native: no g\+\+"):
        driver.load(oracle_dir, kernels="native")
