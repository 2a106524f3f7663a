"""Model directories with random weights: real in every shape, small enough for a test on a laptop."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.engine.models import glm_config, glm_shapes, tokens
from shared.engine.models.config import read_json, token_ids
from shared.errors import InvalidRequest, Unsupported

# Every peculiarity of GLM-5.2 in 1.7 million parameters: shared selections (F F F S S S F), 8 of the visible tokens
# selected, dense and mixture layers, an MTP layer, sizes that are no multiples of each other.
GLM_52: Mapping[str, Any] = {
    "architectures": [glm_config.ARCHITECTURE],
    "model_type": "glm_moe_dsa",
    "dtype": "float32",
    "vocab_size": 512,
    "hidden_size": 120,
    "intermediate_size": 200,
    "moe_intermediate_size": 56,
    "num_hidden_layers": 7,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "q_lora_rank": 72,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_share_for_mtp_iteration": True,
    "max_position_embeddings": 1_048_576,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 8_000_000},
    "rope_interleave": True,
    "indexer_rope_interleave": True,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "eos_token_id": [500, 507, 509],
    "pad_token_id": 500,
}
# The same with rows of whole groups of 16, as real models have them: it can be quantized to NVFP4.
GLM_52_EVEN: Mapping[str, Any] = {
    **GLM_52,
    "hidden_size": 112,
    "intermediate_size": 208,
    "moe_intermediate_size": 48,
    "q_lora_rank": 80,
    "kv_lora_rank": 48,
}
# The same with experts that are whole tiles of the scales that FP4 tensor cores read (`kernels.w4a4`).
GLM_52_TILES: Mapping[str, Any] = {**GLM_52_EVEN, "hidden_size": 128, "moe_intermediate_size": 64}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "glm-5.2": GLM_52,
    "glm-5.2-even": GLM_52_EVEN,
    "glm-5.2-tiles": GLM_52_TILES,
}
# What makes text of token ids, and a prompt of a conversation; a directory has some of them.
TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)


def write(kind: str, model_dir: Path, seed: int = 0, tokenizer_dir: Path | None = None) -> None:
    """Write `config.json` and `model.safetensors`, equal for equal seeds; with the tokenizer of another model directory
    also that, and the model has its vocabulary and its stop tokens. Raises InvalidRequest for an unknown kind, and
    Unsupported for a tokenizer that cannot be read.

    Matrices have a standard deviation of 1.5 / sqrt(inputs): enough that every choice of the model is felt.
    """
    if kind not in KINDS:
        raise InvalidRequest(f"there is no tiny {kind!r}, only {', '.join(KINDS)}", param="kind")
    fields = {**KINDS[kind], **(_vocabulary(tokenizer_dir) if tokenizer_dir else {})}
    config = glm_config.parse(fields)
    shapes = glm_shapes.shapes(config)
    for layer in range(config.num_mtp_layers):
        shapes |= glm_shapes.mtp_shapes(config, config.num_layers + layer)
    noise = torch.Generator().manual_seed(seed)
    model_dir.mkdir(parents=True, exist_ok=True)
    save_file({name: _tensor(name, shape, noise) for name, shape in shapes.items()}, model_dir / "model.safetensors")
    (model_dir / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    if tokenizer_dir is not None:
        for name in filter(lambda name: (tokenizer_dir / name).is_file(), TEXT_FILES):
            shutil.copyfile(tokenizer_dir / name, model_dir / name)


def _vocabulary(tokenizer_dir: Path) -> dict[str, Any]:
    """What a `config.json` says of the tokenizer of another model. Raises Unsupported."""
    if not (num := tokens.num_in(tokenizer_dir / "tokenizer.json")):
        raise Unsupported(f"the tokenizer in {tokenizer_dir} has no tokens")
    generation = tokenizer_dir / "generation_config.json"
    said = read_json(tokenizer_dir / "config.json") | (read_json(generation) if generation.is_file() else {})
    stops = list(token_ids(said.get("eos_token_id")))
    return {"vocab_size": num, "eos_token_id": stops, "pad_token_id": stops[0] if stops else 0}


def _tensor(name: str, shape: tuple[int, ...], noise: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=noise)
    if name.endswith("bias"):
        return 0.1 * values
    return 1 + 0.1 * values if len(shape) == 1 else values * 1.5 / shape[-1] ** 0.5
