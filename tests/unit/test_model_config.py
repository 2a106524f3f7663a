import json
from pathlib import Path
from typing import Any

import pytest

from shared.engine.models import config, registry
from shared.errors import Unsupported

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rope_theta": 500.0,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_head_dim_and_kv_heads_follow_from_the_heads_unless_given() -> None:
    derived = config.parse(LLAMA)
    assert (derived.head_dim, derived.num_kv_heads) == (16, 4)
    given = config.parse(LLAMA | {"head_dim": 32, "num_key_value_heads": 2})
    assert (given.head_dim, given.num_kv_heads) == (32, 2)


def test_both_spellings_of_rope_mean_the_same() -> None:
    old = config.parse(LLAMA | {"rope_scaling": LLAMA3 | {"rope_type": "llama3"}})
    new = config.parse(LLAMA | {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 500.0}})
    assert old == new
    assert old.rope_scaling == config.RopeScaling(8.0, 1.0, 4.0, 8192)
    assert old.rope_theta == 500.0


@pytest.mark.parametrize("value", [7, [7]])
def test_one_end_token_may_be_written_alone(value: int | list[int]) -> None:
    assert config.parse(LLAMA, value).eos_token_ids == (7,)


def test_end_tokens_of_the_generation_config_win(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 1}))
    assert config.read(tmp_path).eos_token_ids == (1,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    assert config.read(tmp_path).eos_token_ids == (1, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": None}, "names no architecture"),
        ({"hidden_size": None}, "wrong kind"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "'factor'"),
        ({"num_key_value_heads": 3}, "3 KV heads"),
        ({"head_dim": 15}, "odd"),
        ({"vocab_size": 0}, "below 1"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        config.parse(LLAMA | change)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(Unsupported, match="lacks 'hidden_size'"):
        config.parse({name: value for name, value in LLAMA.items() if name != "hidden_size"})


@pytest.mark.parametrize("text", ["", "[]", "{", '{"architectures": []}'])
def test_a_broken_config_file_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(Unsupported, match=r"config\.json"):
        registry.architecture(tmp_path)
    with pytest.raises(Unsupported, match=r"config\.json"):
        config.read(tmp_path)


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"no config\.json"):
        config.read(tmp_path)
