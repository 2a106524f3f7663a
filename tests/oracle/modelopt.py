"""What NVIDIA ModelOpt 0.47.0 made of a small model, and the model.

`modelopt_0_47.safetensors` was written on the CPU (torch 2.13, transformers 5.24) by

    model = transformers.AutoModelForCausalLM.from_pretrained(DIR, dtype=torch.bfloat16)
    mtq.quantize(model, mtq.NVFP4_DEFAULT_CFG, lambda m: m(torch.arange(1, 40)[None]))
    export_hf_checkpoint(model, export_dir=...)

where `write(DIR)` had made DIR. Its weights follow from a formula, so that only ModelOpt's output is kept here.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shared.engine.models.config import parse
from shared.engine.models.dense_shapes import shapes

PROMPT = list(range(1, 40))
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 128,
    "vocab_size": 64,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def write(model_dir: Path) -> None:
    """The model that ModelOpt was given."""
    model_dir.mkdir()
    (model_dir / "config.json").write_text(json.dumps(CONFIG))
    weights = enumerate(sorted(shapes(parse(CONFIG)).items()))
    save_file({name: _weight(n, shape) for n, (name, shape) in weights}, model_dir / "model.safetensors")


def result() -> dict[str, torch.Tensor]:
    """What ModelOpt made of it."""
    return load_file(Path(__file__).with_name("modelopt_0_47.safetensors"))


def _weight(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    values = (torch.arange(torch.Size(shape).numel()) * 37 + number * 11) % 101 - 50
    return (values.float() / (64 + number)).view(shape).bfloat16()
