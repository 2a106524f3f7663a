"""Tiny random models written as GGUF, as llama.cpp's exporter lays them out, and converted back."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from shared.errors import Unsupported
from shared.models.gguf.convert import convert
from shared.models.gguf.tensors import LAYER_NAMES, MODEL_NAMES
from shared.models.gguf.tokenizer import QWEN2_WORDS
from tests.oracle import driver, tiny_models

TO_GGUF = {hf: name for name, hf in MODEL_NAMES.items()} | {
    f"model.layers.{layer}.{hf}.weight": f"blk.{layer}.{name}.weight"
    for layer in range(tiny_models.SIZES["num_hidden_layers"])
    for name, hf in LAYER_NAMES.items()
}
RULES = {"llama": "smollm", "qwen3": "qwen2"}


def export(model: Any, path: Path, **changes: Any) -> Path:
    """Write a transformers model as GGUF."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if "rope_scaling" in changes:
        writer.add_rope_scaling_type(changes["rope_scaling"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(RULES[family])
    writer.add_token_list([f"<{token}>" for token in range(config.vocab_size - 3)] + ["a", "b", "ab"])
    writer.add_token_types([3] * (config.vocab_size - 4) + [4, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(7)
    writer.add_add_bos_token(changes.get("add_bos", False))
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(TO_GGUF[name], exported(name, tensor, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def exported(name: str, tensor: torch.Tensor, config: Any) -> np.ndarray[Any, Any]:
    """llama.cpp lays the two halves of a head, which rotate together, side by side: row (half, i) becomes (i, half)."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if config.model_type == "llama" and heads:
        halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
        tensor = torch.stack([halves[:, 0], halves[:, 1]], dim=2).flatten(0, 2)
    return tensor.numpy()


@pytest.mark.parametrize("variant", ["llama", "llama-tied", "llama-mha", "qwen3", "qwen3-tied"])
def test_a_model_survives_the_way_through_gguf(variant: str, tmp_path: Path) -> None:
    model = tiny_models.write(variant, tmp_path / "original")
    (tmp_path / "converted").mkdir()
    convert(export(model, tmp_path / "model.gguf"), tmp_path / "converted")
    original = load_file(tmp_path / "original" / "model.safetensors")
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert original.keys() == converted.keys()
    assert [name for name in original if not torch.equal(original[name], converted[name])] == []
    prompt = [5, 90, 17, 33, 200, 8]
    executor = driver.load(tmp_path / "converted")
    assert driver.generate(executor, prompt, 12) == tiny_models.greedy_tokens(model, prompt, 12)
    assert executor.spec.eos_token_ids == (2, 7)


def test_half_precision_is_widened_without_loss(tmp_path: Path) -> None:
    model = tiny_models.write("llama", tmp_path / "original").half()
    (tmp_path / "converted").mkdir()
    convert(export(model, tmp_path / "model.gguf"), tmp_path / "converted")
    converted = load_file(tmp_path / "converted" / "model.safetensors")
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}
    assert all(torch.equal(tensor.float(), converted[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("variant", ["llama", "qwen3"])
def test_added_tokens_are_matched_whole_and_only_control_tokens_are_special(variant: str, tmp_path: Path) -> None:
    convert(export(tiny_models.write(variant, tmp_path / "original"), tmp_path / "model.gguf"), tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("<5>ab<207>ba").ids == [5, 210, 207, 209, 208]
    assert tokenizer.decode([5, 210, 207]) == "ab<207>"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<2>"


def test_qwen_words_are_cut_as_transformers_cuts_them() -> None:
    assert QWEN2_WORDS == transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX


@pytest.mark.parametrize(
    ("change", "message"),
    [({"rope_scaling": gguf.RopeScalingType.YARN}, "rope scaling 'yarn'"), ({"add_bos": True}, "begin or end tokens")],
)
def test_what_would_be_computed_wrongly_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = export(tiny_models.write("llama", tmp_path / "original"), tmp_path / "model.gguf", **change)
    with pytest.raises(Unsupported, match=message):
        convert(path, tmp_path)
