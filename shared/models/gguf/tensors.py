"""GGUF tensors as Hugging Face tensors: names, float32 values, and the order of rotary pairs."""

import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from gguf import dequantize

from shared.errors import Unsupported
from shared.models.gguf.metadata import GgufFile

Array = npt.NDArray[np.float32]

MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor. Raises Unsupported for one that our models do not have."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in LAYER_NAMES:
        return f"model.layers.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight"
    if name not in MODEL_NAMES:
        raise Unsupported(f"GGUF tensor {name!r} is not supported")
    return MODEL_NAMES[name]


def tensors(file: GgufFile) -> Iterator[tuple[str, Array]]:
    """Every tensor: its Hugging Face name and its values, float32 [rows, columns] or [size]. Raises Unsupported."""
    num_heads = file.need_of_architecture("attention.head_count")
    num_rotated = {"attn_q": num_heads, "attn_k": file.of_architecture("attention.head_count_kv", num_heads)}
    for tensor in file.tensors:
        name = hf_name(tensor.name)
        try:
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise Unsupported(f"GGUF quantization {kind} of {tensor.name!r} is not supported") from None
        part = tensor.name.split(".")[-2]
        if file.architecture == "llama" and part in num_rotated:
            values = unpair(values, num_rotated[part])
        yield name, values


def unpair(weight: Array, num_heads: int) -> Array:
    """From ggml's order of a head's rows, rotary pairs side by side (0, D/2, 1, D/2 + 1, …), back to 0, 1, 2, …

    [num_heads * D, hidden] to the same. llama.cpp reorders q and k of the llama architecture so when it exports them
    (`LlamaModel.permute` in its convert_hf_to_gguf.py); other architectures keep their order.
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, hidden))
