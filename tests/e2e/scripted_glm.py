"""A GLM-5.2 that says what it was told to: all of its layers compute, and none adds anything, so that what follows a
token depends on that token alone."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from shared.engine.models import tiny
from tests.unit.gateway import glm
from tests.unit.gateway.tiny_tokenizers import write_model

STOPS = ("<|endoftext|>", "<|user|>", "<|observation|>")


def write(model_dir: Path, script: Sequence[str]) -> Tokenizer:
    """A model directory with GLM's tags and template. Each token of the script, none of them twice, brings the next;
    the drafting layer knows it, too."""
    tiny.write("glm-5.2", model_dir)
    tokenizer = glm.small_tokenizer()
    write_model(model_dir, tokenizer, glm.TEMPLATE)
    config = json.loads((model_dir / "config.json").read_text())
    config["eos_token_id"] = [tokenizer.token_to_id(stop) for stop in STOPS]
    (model_dir / "config.json").write_text(json.dumps(config))
    tensors = load_file(model_dir / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
        elif name.endswith(("norm.weight", "enorm.weight")):
            tensor.fill_(1)
        elif name.endswith("eh_proj.weight"):
            tensor.copy_(torch.eye(*tensor.shape))
    embedding, head = tensors["model.embed_tokens.weight"], torch.zeros_like(tensors["lm_head.weight"])
    ids = [tokenizer.token_to_id(token) for token in script]
    head[ids[1:]] = embedding[ids[:-1]]
    save_file(tensors | {"lm_head.weight": head}, model_dir / "model.safetensors")
    return tokenizer
