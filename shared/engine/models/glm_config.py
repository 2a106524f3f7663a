"""What a GLM-5, 5.1 or 5.2 decoder (`glm_moe_dsa`) is made of, read from its `config.json`.

Traps of these files: `head_dim` says something else in every release and is ignored (the rotary dimension is
`qk_rope_head_dim`); a missing `rope_parameters` would silently mean another theta and is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.engine.models.config import Fields, read_json, require_known_quantization, token_ids
from shared.errors import Unsupported

ARCHITECTURE = "GlmMoeDsaForCausalLM"


@dataclass(frozen=True, slots=True)
class GlmConfig:
    """Latent attention (MLA) with a sparse selection (DSA) that layers share, and a mixture of experts."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_num_heads: int
    index_head_dim: int
    index_topk: int
    full_layers: tuple[bool, ...]  # which layers select for themselves; the others use the nearest earlier selection
    moe_layers: tuple[bool, ...]
    moe_intermediate_size: int
    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    num_groups: int
    num_chosen_groups: int
    routed_scaling_factor: float
    normalize_top_k: bool
    rms_norm_eps: float
    latent_norm_eps: float
    rope_theta: float
    num_mtp_layers: int
    share_mtp_selection: bool  # whether drafts keep the selection of the last token before them (5.2), or select anew
    max_position: int
    eos_token_ids: tuple[int, ...]

    @property
    def latent_dim(self) -> int:
        """Values per token and layer in the cache: the latent, and the rotary key that all heads share."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def qk_head_dim(self) -> int:
        """Dimension of a query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim


def read(model_dir: Path) -> GlmConfig:
    """The configuration of a model directory. Raises Unsupported if it is unreadable or asks for what we cannot do."""
    fields = read_json(model_dir / "config.json")
    require_known_quantization(fields)
    return parse(fields)


def parse(fields: Fields) -> GlmConfig:
    """The configuration in the fields of a `config.json`. Raises Unsupported."""
    try:
        config = _parse(fields)
    except KeyError as missing:
        raise Unsupported(f"config.json lacks {missing}") from None
    except (TypeError, ValueError) as error:
        raise Unsupported(f"config.json has a value of the wrong kind: {error}") from None
    if not config.full_layers or not config.full_layers[0]:
        raise Unsupported("the first layer has no earlier selection to share: it must have an indexer of its own")
    if not all(fields.get(name, True) for name in ("rope_interleave", "indexer_rope_interleave")):
        raise Unsupported("rotary embedding with halves paired is not supported for this architecture")
    if fields.get("scoring_func", "sigmoid") != "sigmoid" or fields.get("topk_method", "noaux_tc") != "noaux_tc":
        raise Unsupported("experts are chosen by sigmoid scores with a correction bias only (noaux_tc)")
    if fields.get("attention_bias") or fields.get("tie_word_embeddings"):
        raise Unsupported("attention_bias and tie_word_embeddings are not supported for this architecture")
    return config


def _parse(fields: Fields) -> GlmConfig:
    num_layers, eps = int(fields["num_hidden_layers"]), float(fields.get("rms_norm_eps", 1e-5))
    rope = fields["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type {rope['rope_type']!r}")
    return GlmConfig(
        vocab_size=int(fields["vocab_size"]),
        hidden_size=int(fields["hidden_size"]),
        intermediate_size=int(fields["intermediate_size"]),
        num_layers=num_layers,
        num_heads=int(fields["num_attention_heads"]),
        q_lora_rank=int(fields["q_lora_rank"]),
        kv_lora_rank=int(fields["kv_lora_rank"]),
        qk_nope_head_dim=int(fields["qk_nope_head_dim"]),
        qk_rope_head_dim=int(fields["qk_rope_head_dim"]),
        v_head_dim=int(fields["v_head_dim"]),
        index_num_heads=int(fields["index_n_heads"]),
        index_head_dim=int(fields["index_head_dim"]),
        index_topk=int(fields["index_topk"]),
        full_layers=tuple(full_layers(fields, num_layers)),
        moe_layers=tuple(moe_layers(fields, num_layers)),
        moe_intermediate_size=int(fields["moe_intermediate_size"]),
        num_experts=int(fields["n_routed_experts"]),
        num_experts_per_token=int(fields["num_experts_per_tok"]),
        num_shared_experts=int(fields["n_shared_experts"]),
        num_groups=int(fields.get("n_group") or 1),
        num_chosen_groups=int(fields.get("topk_group") or 1),
        routed_scaling_factor=float(fields.get("routed_scaling_factor", 1.0)),
        normalize_top_k=bool(fields.get("norm_topk_prob", True)),
        rms_norm_eps=eps,
        latent_norm_eps=float(fields.get("latent_norm_eps", eps)),
        rope_theta=float(rope["rope_theta"]),
        num_mtp_layers=int(fields.get("num_nextn_predict_layers") or 0),
        share_mtp_selection=bool(fields.get("index_share_for_mtp_iteration", False)),
        max_position=int(fields["max_position_embeddings"]),
        eos_token_ids=token_ids(fields["eos_token_id"]),
    )


def full_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers have an indexer: `indexer_types`, else `index_topk_pattern`, else frequency and offset, else all."""
    if types := fields.get("indexer_types"):
        return _per_layer(types, num_layers, {"full": True, "shared": False}, "indexer_types")
    if pattern := fields.get("index_topk_pattern"):
        return _per_layer(pattern, num_layers, {"F": True, "S": False}, "index_topk_pattern")
    frequency, offset = fields.get("index_topk_freq") or 1, fields.get("index_skip_topk_offset")
    skipped = 2 if offset is None else offset
    return [max(layer - skipped + 1, 0) % frequency == 0 for layer in range(num_layers)]


def moe_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers are mixtures: `mlp_layer_types`, else all behind the first dense ones."""
    if types := fields.get("mlp_layer_types"):
        return _per_layer(types, num_layers, {"sparse": True, "dense": False}, "mlp_layer_types")
    return [layer >= int(fields["first_k_dense_replace"]) for layer in range(num_layers)]


def _per_layer(values: Sequence[str], num_layers: int, meaning: dict[str, bool], name: str) -> list[bool]:
    if len(values) < num_layers or not set(values) <= meaning.keys():
        raise ValueError(f"{name} must say one of {', '.join(meaning)} for each of {num_layers} layers")
    return [meaning[value] for value in values[:num_layers]]
