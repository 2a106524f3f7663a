"""A random GLM-5.2 of 1.7 million parameters whose selection is really sparse (8 of the visible tokens)."""

from pathlib import Path
from typing import Any

import torch
import transformers

from shared.engine.models.glm_config import ARCHITECTURE

FIELDS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 32,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "index_topk": 8,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 8e6},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": [500, 507, 509],
    "pad_token_id": 500,
}
# A layer of each kind: dense and selecting, a mixture that shares the selection, a mixture that selects for itself.
FEW_LAYERS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "index_topk_freq": 2,
    "index_skip_topk_offset": 1,
}


def make(seed: int = 1, **changes: Any) -> Any:
    """The transformers model, float32, with weights spread enough that a wrong choice anywhere shows."""
    config = transformers.GlmMoeDsaConfig(**(FIELDS | changes))
    config._attn_implementation = config._experts_implementation = "eager"
    model = transformers.GlmMoeDsaForCausalLM(config).float().eval()  # type: ignore[no-untyped-call]
    randomize(model, seed)
    return model


def randomize(module: Any, seed: int) -> None:
    """Draw every parameter, and the correction biases."""
    biases = [(name, buffer) for name, buffer in module.named_buffers() if "e_score_correction_bias" in name]
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *biases]:
            noise = torch.randn(tensor.shape)
            if name.endswith("bias"):
                tensor.copy_(0.1 * noise)
            elif "norm" in name:
                tensor.copy_(1 + 0.1 * noise)
            else:
                tensor.copy_(noise * 1.5 / tensor.shape[-1] ** 0.5)


def write(model_dir: Path, seed: int = 1, **changes: Any) -> Any:
    """Save such a model as a Hugging Face directory, and return it.

    transformers takes 1e-6 for the norms of the latents whatever the configuration says; the directory says so too.
    """
    model = make(seed, **changes)
    model.config.architectures = [ARCHITECTURE]
    model.config.latent_norm_eps = 1e-6
    model.save_pretrained(model_dir)
    return model
