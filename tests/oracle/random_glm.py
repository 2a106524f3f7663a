"""A random GLM of the real head geometry, 64 million parameters, as a directory; made without transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.engine.models.glm_config import ARCHITECTURE, parse
from shared.engine.models.glm_shapes import mtp_shapes, shapes

FIELDS: dict[str, Any] = {
    "architectures": [ARCHITECTURE],
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 7,
    "num_nextn_predict_layers": 1,
    "index_share_for_mtp_iteration": True,
    "num_attention_heads": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 64,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 8e6},
    "max_position_embeddings": 4096,
    "eos_token_id": [1000],
}


def write(model_dir: Path, seed: int = 1, spread: float = 1.0, **changes: Any) -> None:
    """Matrices of rows of norm `spread`, in bfloat16 as published checkpoints are; correction biases in float32."""
    fields, chance = FIELDS | changes, torch.Generator().manual_seed(seed)
    config = parse(fields)
    tensors = {}
    for name, shape in (shapes(config) | mtp_shapes(config, config.num_layers)).items():
        noise = torch.randn(shape, generator=chance)
        if name.endswith("correction_bias"):
            tensors[name] = 0.1 * noise
        elif len(shape) == 1:
            tensors[name] = (0.1 * noise + (0.0 if name.endswith("bias") else 1.0)).bfloat16()
        else:
            tensors[name] = (noise * spread * shape[-1] ** -0.5).bfloat16()
    save_file(tensors, model_dir / "model.safetensors")
    (model_dir / "config.json").write_text(json.dumps(fields))
