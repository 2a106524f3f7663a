"""The tensors of a GLM-5 decoder: their names and shapes in a checkpoint."""

from shared.engine.models.dense_shapes import EMBEDDING, FINAL_NORM, HEAD
from shared.engine.models.glm_config import GlmConfig

Shapes = dict[str, tuple[int, ...]]


def shapes(config: GlmConfig) -> Shapes:
    """Every tensor of the model without its MTP layers, with its shape."""
    hidden = config.hidden_size
    expected: Shapes = {EMBEDDING: (config.vocab_size, hidden)}
    for layer, (full, moe) in enumerate(zip(config.full_layers, config.moe_layers, strict=True)):
        expected |= _layer_shapes(config, f"model.layers.{layer}.", full=full, moe=moe)
    return expected | {FINAL_NORM: (hidden,), HEAD: (config.vocab_size, hidden)}


def mtp_shapes(config: GlmConfig, layer: int) -> Shapes:
    """The tensors of an MTP layer: a mixture layer with an indexer of its own, and what joins it to the model."""
    prefix, hidden = f"model.layers.{layer}.", config.hidden_size
    expected = _layer_shapes(config, prefix, full=True, moe=True)
    expected |= {prefix + name: (hidden,) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    return expected | {prefix + "eh_proj.weight": (hidden, 2 * hidden)}


def _layer_shapes(config: GlmConfig, prefix: str, *, full: bool, moe: bool) -> Shapes:
    attention = _attention_shapes(config) | (_indexer_shapes(config) if full else {})
    mlp = _moe_shapes(config) if moe else _mlp_shapes(config, config.intermediate_size)
    norms = {f"{name}.weight": (config.hidden_size,) for name in ("input_layernorm", "post_attention_layernorm")}
    return (
        {f"{prefix}self_attn.{name}": shape for name, shape in attention.items()}
        | {f"{prefix}mlp.{name}": shape for name, shape in mlp.items()}
        | {prefix + name: shape for name, shape in norms.items()}
    )


def _attention_shapes(config: GlmConfig) -> Shapes:
    heads, up = config.num_heads, config.qk_nope_head_dim + config.v_head_dim
    return {
        "q_a_proj.weight": (config.q_lora_rank, config.hidden_size),
        "q_a_layernorm.weight": (config.q_lora_rank,),
        "q_b_proj.weight": (heads * config.qk_head_dim, config.q_lora_rank),
        "kv_a_proj_with_mqa.weight": (config.latent_dim, config.hidden_size),
        "kv_a_layernorm.weight": (config.kv_lora_rank,),
        "kv_b_proj.weight": (heads * up, config.kv_lora_rank),
        "o_proj.weight": (config.hidden_size, heads * config.v_head_dim),
    }


def _indexer_shapes(config: GlmConfig) -> Shapes:
    return {
        "indexer.wq_b.weight": (config.index_num_heads * config.index_head_dim, config.q_lora_rank),
        "indexer.wk.weight": (config.index_head_dim, config.hidden_size),
        "indexer.k_norm.weight": (config.index_head_dim,),
        "indexer.k_norm.bias": (config.index_head_dim,),
        "indexer.weights_proj.weight": (config.index_num_heads, config.hidden_size),
    }


def _mlp_shapes(config: GlmConfig, inner: int) -> Shapes:
    hidden = config.hidden_size
    return {
        "gate_proj.weight": (inner, hidden),
        "up_proj.weight": (inner, hidden),
        "down_proj.weight": (hidden, inner),
    }


def _moe_shapes(config: GlmConfig) -> Shapes:
    inner = config.moe_intermediate_size
    expected: Shapes = {}
    for expert in range(config.num_experts):
        expected |= {f"experts.{expert}.{name}": shape for name, shape in _mlp_shapes(config, inner).items()}
    shared = _mlp_shapes(config, inner * config.num_shared_experts)
    expected |= {f"shared_experts.{name}": shape for name, shape in shared.items()}
    expected["gate.weight"] = (config.num_experts, config.hidden_size)
    expected["gate.e_score_correction_bias"] = (config.num_experts,)
    return expected
