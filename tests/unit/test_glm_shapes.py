"""The tensors that we expect of real GLM-5 checkpoints add up to what their publisher counts."""

from math import prod
from typing import Any

import pytest

from shared.engine.models import glm_config, glm_shapes

GLM_52: dict[str, Any] = {
    "vocab_size": 154880,
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {"rope_theta": 8_000_000, "rope_type": "default"},
    "head_dim": 192,
    "max_position_embeddings": 1_048_576,
    "eos_token_id": [154820, 154827, 154829],
}
GLM_51 = {name: value for name, value in GLM_52.items() if not name.startswith(("index_topk_", "index_skip"))} | {
    "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
    "max_position_embeddings": 202_752,
}


def all_shapes(fields: dict[str, Any]) -> glm_shapes.Shapes:
    config = glm_config.parse(fields)
    return glm_shapes.shapes(config) | glm_shapes.mtp_shapes(config, config.num_layers)


@pytest.mark.parametrize(
    ("fields", "num_tensors", "num_parameters", "num_bytes"),
    [
        (GLM_52, 59_585, 753_329_940_480, 1_506_659_919_872),
        (GLM_51, 59_870, 753_864_139_008, 1_507_728_316_928),
    ],
    ids=["GLM-5.2", "GLM-5.1"],
)
def test_published_totals_are_reproduced(
    fields: dict[str, Any], num_tensors: int, num_parameters: int, num_bytes: int
) -> None:
    shapes = all_shapes(fields)
    widths = {name: 4 if name.endswith("e_score_correction_bias") else 2 for name in shapes}
    assert len(shapes) == num_tensors
    assert sum(prod(shape) for shape in shapes.values()) == num_parameters
    assert sum(prod(shape) * widths[name] for name, shape in shapes.items()) == num_bytes


def test_every_way_to_say_which_layers_select_means_the_same_for_glm_52() -> None:
    by_frequency = glm_config.parse(GLM_52).full_layers
    pattern = "".join("F" if full else "S" for full in by_frequency)
    types = ["full" if full else "shared" for full in by_frequency]
    assert pattern.startswith("FFFSSSFSSSF")
    assert sum(by_frequency) == 21
    assert glm_config.parse(GLM_52 | {"index_topk_pattern": pattern}).full_layers == by_frequency
    assert glm_config.parse(GLM_52 | {"indexer_types": types}).full_layers == by_frequency
    assert all(glm_config.parse(GLM_51).full_layers)


def test_a_page_of_glm_52_has_the_published_bytes_per_token() -> None:
    config = glm_config.parse(GLM_52)
    per_token = config.num_layers * config.latent_dim + sum(config.full_layers) * config.index_head_dim
    assert 2 * per_token == 95_232
