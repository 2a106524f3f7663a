"""What a dense decoder is made of, read from the `config.json` of a Hugging Face directory.

Everything is checked here, once: a field that this build cannot honour ends the start with a message that names it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import Unsupported

# fp8 (blocks of 128), NVIDIA ModelOpt's NVFP4, llm-compressor's NVFP4
QUANTIZATIONS = ("fp8", "modelopt", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3's stretching of the low frequencies (`rope_type` "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class DenseConfig:
    """A decoder of the Llama kind: RMSNorm, rotary GQA attention, gated SiLU MLP."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position: int
    eos_token_ids: tuple[int, ...]


Fields = Mapping[str, Any]


def read(model_dir: Path) -> DenseConfig:
    """The configuration of a model directory. Raises Unsupported if it is unreadable or asks for what we cannot do."""
    fields = read_json(model_dir / "config.json")
    generation = model_dir / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return parse(fields, fields.get("eos_token_id") if eos is None else eos)


def parse(fields: Fields, eos_token_id: int | list[int] | None = None) -> DenseConfig:
    """The configuration in the fields of a `config.json`. Raises Unsupported."""
    architecture = _architecture(fields)
    qwen3 = architecture == "Qwen3ForCausalLM"
    _refuse_what_we_lack(fields)
    try:
        hidden_size, num_heads = int(fields["hidden_size"]), int(fields["num_attention_heads"])
        theta, scaling = _rope(fields)
        config = DenseConfig(
            architecture=architecture,
            vocab_size=int(fields["vocab_size"]),
            hidden_size=hidden_size,
            intermediate_size=int(fields["intermediate_size"]),
            num_layers=int(fields["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(fields.get("num_key_value_heads") or num_heads),
            head_dim=int(fields.get("head_dim") or (128 if qwen3 else hidden_size // num_heads)),
            rms_norm_eps=float(fields.get("rms_norm_eps", 1e-6)),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=bool(fields.get("tie_word_embeddings", False)),
            attention_bias=bool(fields.get("attention_bias", False)),
            mlp_bias=bool(fields.get("mlp_bias", False)),
            qk_norm=qwen3,
            max_position=int(fields.get("max_position_embeddings", 2048)),
            eos_token_ids=token_ids(eos_token_id),
        )
    except KeyError as missing:
        raise Unsupported(f"config.json lacks {missing}") from None
    except (TypeError, ValueError) as error:
        raise Unsupported(f"config.json has a value of the wrong kind: {error}") from None
    _check_sizes(config)
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises Unsupported."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unsupported(f"{path.parent} is not a model directory: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise Unsupported(f"{path} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise Unsupported(f"{path} does not hold a JSON object")
    return fields


def _architecture(fields: Fields) -> str:
    names = fields.get("architectures") or [None]
    if not isinstance(names[0], str):
        raise Unsupported("config.json names no architecture")
    return names[0]


def _refuse_what_we_lack(fields: Fields) -> None:
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise Unsupported(f"hidden_act {fields['hidden_act']!r} is not supported, only silu")
    if fields.get("use_sliding_window"):
        raise Unsupported("use_sliding_window is not supported")
    require_known_quantization(fields)
    if float(fields.get("partial_rotary_factor") or 1.0) != 1.0:
        raise Unsupported("partial_rotary_factor is not supported")


def require_known_quantization(fields: Fields) -> None:
    """Raises Unsupported for a way to quantize that the checkpoint reader does not know. Which layers are quantized
    is decided by their tensors, not by what this field says of them."""
    method = (fields.get("quantization_config") or {}).get("quant_method", QUANTIZATIONS[0])
    if method not in QUANTIZATIONS:
        raise Unsupported(f"quant_method {method!r} is not supported, only {', '.join(QUANTIZATIONS)}")


def _rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Both spellings: `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    rope = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise Unsupported(f"rope_type {kind!r} is not supported, only default and llama3")
    return theta, RopeScaling(
        factor=float(rope["factor"]),
        low_freq_factor=float(rope["low_freq_factor"]),
        high_freq_factor=float(rope["high_freq_factor"]),
        original_max_position=int(rope["original_max_position_embeddings"]),
    )


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """A field that may hold one id, several or none."""
    if value is None:
        return ()
    return tuple(int(token) for token in value) if isinstance(value, list) else (int(value),)


def _check_sizes(config: DenseConfig) -> None:
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.head_dim)
    if min(*sizes, config.num_heads, config.num_kv_heads, config.max_position) < 1:
        raise Unsupported("config.json has a size below 1")
    if config.num_heads % config.num_kv_heads:
        raise Unsupported(f"{config.num_heads} heads cannot share {config.num_kv_heads} KV heads evenly")
    if config.head_dim % 2:
        raise Unsupported(f"head_dim {config.head_dim} is odd: rotary embedding needs an even one")
