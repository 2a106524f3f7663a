"""The tensors of a dense decoder: their names and shapes in a checkpoint, and how layers take them."""

from dataclasses import dataclass

import torch

from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.config import DenseConfig
from shared.engine.parallel.partition import Shard, of_dense

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer; q, k, v are one matrix [(H + 2 Hkv) D, hidden] and gate, up one [2 I, hidden]. Biases may be None."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: torch.Tensor
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor | None
    down: torch.Tensor
    down_bias: torch.Tensor | None


class DenseWeights:
    """The weights of a checkpoint that has been checked against a configuration, or a rank's share of them; layers are
    read one at a time. `config` is that of the share."""

    def __init__(self, checkpoint: Checkpoint, config: DenseConfig, shard: Shard) -> None:
        # A tied model may still carry its head; it is the embedding.
        checkpoint.inventory.check(shapes(config), ignored=(HEAD,) if config.tied_embeddings else ())
        self.config, self._part_of = of_dense(config, shard)
        self._checkpoint = checkpoint

    def embedding(self) -> torch.Tensor:
        """[vocab_size, hidden]."""
        return self._read(EMBEDDING)

    def head(self) -> torch.Tensor:
        """[vocab_size, hidden]."""
        return self._read(EMBEDDING if self.config.tied_embeddings else HEAD)

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""
        return self._read(FINAL_NORM)

    def layer(self, index: int) -> LayerWeights:
        """One layer, with what is computed together joined."""
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return LayerWeights(
            input_norm=self._read(prefix + "input_layernorm.weight"),
            qkv=self._join(attention, ("q_proj", "k_proj", "v_proj"), "weight"),
            qkv_bias=self._join(attention, ("q_proj", "k_proj", "v_proj"), "bias")
            if self.config.attention_bias
            else None,
            q_norm=self._read(attention + "q_norm.weight") if self.config.qk_norm else None,
            k_norm=self._read(attention + "k_norm.weight") if self.config.qk_norm else None,
            output=self._read(attention + "o_proj.weight"),
            output_bias=self._read(attention + "o_proj.bias") if self.config.attention_bias else None,
            post_norm=self._read(prefix + "post_attention_layernorm.weight"),
            gate_up=self._join(mlp, ("gate_proj", "up_proj"), "weight"),
            gate_up_bias=self._join(mlp, ("gate_proj", "up_proj"), "bias") if self.config.mlp_bias else None,
            down=self._read(mlp + "down_proj.weight"),
            down_bias=self._read(mlp + "down_proj.bias") if self.config.mlp_bias else None,
        )

    def _read(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(name, part=self._part_of(name))

    def _join(self, prefix: str, names: tuple[str, ...], kind: str) -> torch.Tensor:
        return torch.cat([self._read(f"{prefix}{name}.{kind}") for name in names])


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
