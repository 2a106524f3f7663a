"""Random models of a few hundred kilobytes, written as Hugging Face directories by transformers itself."""

from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-mha": {"num_key_value_heads": 6},
    "llama-derived-head-dim": {"head_dim": None},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-llama3-rope": {"rope_parameters": LLAMA3},
    "llama-odd-sizes": {"hidden_size": 60, "intermediate_size": 90, "head_dim": 16},
    "llama-8-heads": {"num_attention_heads": 8, "attention_bias": True, "mlp_bias": True},
    "qwen3-8-heads": {"architecture": "Qwen3", "num_attention_heads": 8, "num_key_value_heads": 4},
    "qwen3": {"architecture": "Qwen3"},
    "qwen3-tied": {"architecture": "Qwen3", "tie_word_embeddings": True},
}


def write(variant: str, model_dir: Path, max_shard_size: str = "1GB", **changes: Any) -> Any:
    """Save the variant to `model_dir` and return the transformers model, float32, for use as the oracle."""
    fields = SIZES | VARIANTS[variant] | changes
    family = fields.pop("architecture", "Llama")
    torch.manual_seed(sum(map(ord, variant)))
    config = getattr(transformers, f"{family}Config")(**fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:  # their usual start, ones and zeros, would hide mistakes
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(model_dir, max_shard_size=max_shard_size)
    return model


def greedy_tokens(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers continues `prompt` with, one full forward per token: no cache, no generation options."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]
