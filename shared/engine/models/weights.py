"""The tensors of a dense decoder as layers take them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from shared.engine.kernels import w4a4, w4a16
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.config import DenseConfig
from shared.engine.models.dense_shapes import EMBEDDING, FINAL_NORM, HEAD, shapes
from shared.engine.parallel.partition import Shard, of_dense
from shared.engine.quantization.w4a4 import joined

Matrix_co = TypeVar("Matrix_co", covariant=True)


@dataclass(frozen=True, slots=True)
class LayerOf(Generic[Matrix_co]):
    """One layer; q, k, v are one matrix [(H + 2 Hkv) D, hidden] and gate, up one [2 I, hidden]. Biases may be None."""

    input_norm: torch.Tensor
    qkv: Matrix_co
    qkv_bias: torch.Tensor | None
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    output: Matrix_co
    output_bias: torch.Tensor | None
    post_norm: torch.Tensor
    gate_up: Matrix_co
    gate_up_bias: torch.Tensor | None
    down: Matrix_co
    down_bias: torch.Tensor | None


LayerWeights = LayerOf[torch.Tensor]
Fp4Weights = LayerOf[w4a4.Weight | torch.Tensor]


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
        return self._layer(index, lambda names, _: torch.cat([self._read(name) for name in names]))

    def packed_layer(self, index: int) -> LayerOf[w4a16.Weight]:
        """As `layer`, with matrices that are stored in NVFP4 packed, and gate and up in one tile."""
        return self._layer(index, self._packed)

    def fp4_layer(self, index: int) -> Fp4Weights:
        """As `layer`, with matrices for products in FP4 that are stored in NVFP4 and have a scale for their inputs.

        Others, and joined ones whose scales differ, come as in `layer`."""
        return self._layer(index, lambda names, _: self._fp4(names))

    def fp4_head(self) -> w4a4.Weight | torch.Tensor:
        """As `head`, in the same way."""
        return self._fp4((EMBEDDING if self.config.tied_embeddings else HEAD,))

    def packed_head(self) -> w4a16.Weight:
        """As `head`, packed if it is stored in NVFP4."""
        return self._packed((EMBEDDING if self.config.tied_embeddings else HEAD,), False)

    def _layer(self, index: int, join: Callable[[tuple[str, ...], bool], Matrix_co]) -> LayerOf[Matrix_co]:
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return LayerOf(
            input_norm=self._read(prefix + "input_layernorm.weight"),
            qkv=join(_named(attention, "qkv", "weight"), False),
            qkv_bias=self._biases(_named(attention, "qkv", "bias"), self.config.attention_bias),
            q_norm=self._read(attention + "q_norm.weight") if self.config.qk_norm else None,
            k_norm=self._read(attention + "k_norm.weight") if self.config.qk_norm else None,
            output=join(_named(attention, "o", "weight"), False),
            output_bias=self._biases(_named(attention, "o", "bias"), self.config.attention_bias),
            post_norm=self._read(prefix + "post_attention_layernorm.weight"),
            gate_up=join(_named(mlp, ("gate", "up"), "weight"), True),
            gate_up_bias=self._biases(_named(mlp, ("gate", "up"), "bias"), self.config.mlp_bias),
            down=join(_named(mlp, ("down",), "weight"), False),
            down_bias=self._biases(_named(mlp, ("down",), "bias"), self.config.mlp_bias),
        )

    def _read(self, name: str) -> torch.Tensor:
        return self._checkpoint.read(name, part=self._part_of(name))

    def _biases(self, names: tuple[str, ...], wanted: bool) -> torch.Tensor | None:
        return torch.cat([self._read(name) for name in names]) if wanted else None

    def _fp4(self, names: tuple[str, ...]) -> w4a4.Weight | torch.Tensor:
        found = [self._checkpoint.calibrated(name, self._part_of(name)) for name in names]
        parts = [part for part in found if part is not None]
        made = joined(parts) if len(parts) == len(names) else None
        return torch.cat([self._read(name) for name in names]) if made is None else made

    def _packed(self, names: tuple[str, ...], gated: bool) -> w4a16.Weight:
        """All joined, packed if all are stored in NVFP4. Each keeps the scale of its matrix."""
        found = [self._checkpoint.nvfp4(name, self._part_of(name)) for name in names]
        tensors = [tensor for tensor in found if tensor is not None]
        if len(tensors) < len(names) or (gated and sum(len(tensor.codes) for tensor in tensors) % w4a16.ROWS):
            return torch.cat([self._read(name) for name in names])
        factors = torch.cat([tensor.scale_2.expand(len(tensor.codes)) for tensor in tensors])
        codes, scales = (torch.cat([getattr(tensor, part) for tensor in tensors]) for part in ("codes", "scale"))
        return w4a16.pack(codes, scales, factors, gated=gated)


def _named(prefix: str, projections: Iterable[str], kind: str) -> tuple[str, ...]:
    return tuple(f"{prefix}{name}_proj.{kind}" for name in projections)
