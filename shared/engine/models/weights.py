"""The tensors of a dense decoder as layers take them."""

from dataclasses import dataclass

import torch

from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.config import DenseConfig
from shared.engine.models.dense_shapes import EMBEDDING, FINAL_NORM, HEAD, shapes
from shared.engine.parallel.partition import Shard, of_dense


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
