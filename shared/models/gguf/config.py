"""`config.json` and `generation_config.json` from GGUF metadata."""

from typing import Any

import numpy as np

from shared.errors import Unsupported
from shared.models.gguf.metadata import GgufFile

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}


def model_config(file: GgufFile) -> dict[str, Any]:
    """The fields of `config.json`. Raises Unsupported for what the engine cannot compute."""
    if file.architecture not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise Unsupported(f"GGUF architecture {file.architecture!r} is not supported; supported are {known}")
    scaling = file.of_architecture("rope.scaling.type", "none")
    if scaling != "none":
        raise Unsupported(f"GGUF rope scaling {scaling!r} is not supported")
    num_heads = file.need_of_architecture("attention.head_count")
    hidden_size = file.need_of_architecture("embedding_length")
    return {
        "architectures": [ARCHITECTURES[file.architecture]],
        "model_type": file.architecture,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": file.need_of_architecture("feed_forward_length"),
        "num_hidden_layers": file.need_of_architecture("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": file.of_architecture("attention.head_count_kv", num_heads),
        "head_dim": file.of_architecture("attention.key_length", hidden_size // num_heads),
        "rms_norm_eps": _shortest(file.need_of_architecture("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(file.of_architecture("rope.freq_base", 10_000.0)),
        "max_position_embeddings": file.need_of_architecture("context_length"),
        "vocab_size": len(file.need("tokenizer.ggml.tokens")),
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in file.tensors),
        "attention_bias": False,
        "dtype": "float32",
        **_special_ids(file),
    }


def generation_config(file: GgufFile) -> dict[str, Any]:
    """The fields of `generation_config.json`: what starts, ends and pads a text."""
    ids = _special_ids(file)
    ends = [ids.get("eos_token_id"), file.get("tokenizer.ggml.eot_token_id")]
    return ids | {"eos_token_id": list(dict.fromkeys(end for end in ends if end is not None))}


def _special_ids(file: GgufFile) -> dict[str, int]:
    keys = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "pad_token_id": "padding_token_id"}
    ids = {field: file.get(f"tokenizer.ggml.{key}") for field, key in keys.items()}
    return {field: token_id for field, token_id in ids.items() if token_id is not None}


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: GGUF's 9.99999974e-06 was 1e-05 before."""
    return float(str(np.float32(value)))
