"""The tensors of a dense decoder: their names and shapes in a checkpoint."""

from shared.engine.models.config import DenseConfig

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def shapes(config: DenseConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this configuration must have, with its shape."""
    hidden = config.hidden_size
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden), FINAL_NORM: (hidden,)}
    if not config.tied_embeddings:
        expected[HEAD] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        expected |= {prefix + name: shape for name, shape in _layer_shapes(config).items()}
    return expected


def _layer_shapes(config: DenseConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    expected: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for module, matrices, bias in (("self_attn", attention, config.attention_bias), ("mlp", mlp, config.mlp_bias)):
        expected |= {f"{module}.{name}.weight": shape for name, shape in matrices.items()}
        if bias:
            expected |= {f"{module}.{name}.bias": shape[:1] for name, shape in matrices.items()}
    if config.qk_norm:
        expected |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return expected
