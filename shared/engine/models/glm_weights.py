"""The tensors of a GLM-5 decoder as layers take them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from shared.engine.kernels import w4a4, w8a16
from shared.engine.models.checkpoint import Checkpoint
from shared.engine.models.dense_shapes import EMBEDDING, FINAL_NORM, HEAD
from shared.engine.models.glm_config import GlmConfig
from shared.engine.models.glm_shapes import mtp_shapes, shapes
from shared.engine.parallel.partition import Shard, of_glm
from shared.engine.quantization.nvfp4 import Nvfp4Tensor
from shared.engine.quantization.w4a4 import Calibrated, stacked

Matrix_co = TypeVar("Matrix_co", covariant=True)
Stored = torch.Tensor | w8a16.Weight  # dequantized, or in e4m3 as a checkpoint has it


@dataclass(frozen=True, slots=True)
class IndexerOf(Generic[Matrix_co]):
    """The sparse selection of one layer; `key_norm` is a LayerNorm's weight and bias."""

    query: Matrix_co
    key: Matrix_co
    key_norm: tuple[torch.Tensor, torch.Tensor]
    head_weights: torch.Tensor


@dataclass(frozen=True, slots=True)
class AttentionOf(Generic[Matrix_co]):
    """Latent attention. `down` is q_a and kv_a joined [q_lora + latent, hidden]; the two halves of kv_b are apart:
    `up_key` [H, nope, kv_lora] and `up_value` [H, v, kv_lora]."""

    down: Matrix_co
    query_norm: torch.Tensor
    query: Matrix_co
    latent_norm: torch.Tensor
    up_key: torch.Tensor
    up_value: torch.Tensor
    output: Matrix_co
    indexer: IndexerOf[Matrix_co] | None


@dataclass(frozen=True, slots=True)
class MlpOf(Generic[Matrix_co]):
    """gate and up joined [2 I, hidden], and down [hidden, I]."""

    gate_up: Matrix_co
    down: Matrix_co


IndexerWeights = IndexerOf[torch.Tensor]
AttentionWeights = AttentionOf[torch.Tensor]


@dataclass(frozen=True, slots=True)
class MlpWeights(MlpOf[torch.Tensor]):
    """Dequantized, if they were quantized."""


# Expert by expert: gate and up joined, and down.
PackedExperts = tuple[list[Nvfp4Tensor], list[Nvfp4Tensor]]


@dataclass(frozen=True, slots=True)
class MoeWeights:
    """The rank's experts `expert_ids` stacked: gate_up [E, 2 I, hidden], down [E, hidden, I]; the router of all, in
    float32."""

    router: torch.Tensor
    correction_bias: torch.Tensor
    experts: MlpWeights
    expert_ids: range
    shared: MlpWeights


@dataclass(frozen=True, slots=True)
class PackedMoeWeights:
    """As MoeWeights, with experts as they are stored in NVFP4, or laid out for products in FP4."""

    router: torch.Tensor
    correction_bias: torch.Tensor
    experts: PackedExperts | w4a4.Experts
    shared: MlpWeights


@dataclass(frozen=True, slots=True)
class MtpWeights:
    """What joins an MTP layer to the model: norms [hidden] of its two inputs and of its output, and `join`
    [hidden, 2 hidden], embedding first."""

    embedding_norm: torch.Tensor
    state_norm: torch.Tensor
    join: torch.Tensor
    output_norm: torch.Tensor


class GlmWeights:
    """The weights of a checkpoint that has been checked against a configuration, or a rank's share of them; layers are
    read one at a time. `config` is that of the share.

    `has_mtp` says whether there is an MTP layer, and with `mtp` it is wanted: exporters leave it out.
    """

    def __init__(self, checkpoint: Checkpoint, config: GlmConfig, shard: Shard, *, mtp: bool) -> None:
        layers = range(config.num_layers, config.num_layers + config.num_mtp_layers)
        self.has_mtp = mtp and bool(layers) and checkpoint.has(f"model.layers.{layers[0]}.")
        expected = shapes(config) | (mtp_shapes(config, layers[0]) if self.has_mtp else {})
        checkpoint.inventory.check(
            expected, ignored=tuple(name for layer in layers for name in mtp_shapes(config, layer))
        )
        self.config, self._part_of = of_glm(config, shard)
        self._expert_ids = shard.experts(config.num_experts)
        self._checkpoint = checkpoint

    def _read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._checkpoint.read(name, dtype, self._part_of(name))

    def embedding(self) -> torch.Tensor:
        """[vocab_size, hidden]."""
        return self._read(EMBEDDING)

    def head(self) -> torch.Tensor:
        """[vocab_size, hidden]."""
        return self._read(HEAD)

    def final_norm(self) -> torch.Tensor:
        """[hidden]."""
        return self._read(FINAL_NORM)

    def norms(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The norms before attention and before the MLP, [hidden] each."""
        prefix = f"model.layers.{layer}."
        read = self._read
        return read(prefix + "input_layernorm.weight"), read(prefix + "post_attention_layernorm.weight")

    def attention(self, layer: int) -> AttentionWeights:
        """One layer's attention."""
        return self._attention(layer, self._joined)

    def stored_attention(self, layer: int) -> AttentionOf[Stored]:
        """As `attention`, with matrices in e4m3 as they are stored; kv_b is dequantized, since its scales are those of
        blocks that heads and their halves do not fill."""
        return self._attention(layer, self._stored)

    def _joined(self, *names: str) -> torch.Tensor:
        parts = [self._read(name) for name in names]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _stored(self, *names: str) -> Stored:
        """In e4m3 if all of them are."""
        parts = [self._checkpoint.fp8(name, self._part_of(name)) for name in names]
        found = [part for part in parts if part is not None]
        return w8a16.join(found) if len(found) == len(parts) else self._joined(*names)

    def _attention(self, layer: int, join: Callable[..., Matrix_co]) -> AttentionOf[Matrix_co]:
        config, prefix, read = self.config, f"model.layers.{layer}.self_attn.", self._read
        both = read(prefix + "kv_b_proj.weight").view(config.num_heads, -1, config.kv_lora_rank)
        return AttentionOf(
            down=join(prefix + "q_a_proj.weight", prefix + "kv_a_proj_with_mqa.weight"),
            query_norm=read(prefix + "q_a_layernorm.weight"),
            query=join(prefix + "q_b_proj.weight"),
            latent_norm=read(prefix + "kv_a_layernorm.weight"),
            up_key=both[:, : config.qk_nope_head_dim].contiguous(),
            up_value=both[:, config.qk_nope_head_dim :].contiguous(),
            output=join(prefix + "o_proj.weight"),
            indexer=self._indexer(prefix + "indexer.", join) if self._is(config.full_layers, layer) else None,
        )

    def _indexer(self, prefix: str, join: Callable[..., Matrix_co]) -> IndexerOf[Matrix_co]:
        read = self._read
        return IndexerOf(
            query=join(prefix + "wq_b.weight"),
            key=join(prefix + "wk.weight"),
            key_norm=(read(prefix + "k_norm.weight"), read(prefix + "k_norm.bias")),
            head_weights=read(prefix + "weights_proj.weight"),
        )

    def mlp(self, layer: int) -> MlpWeights | MoeWeights:
        """One layer's MLP, dense or a mixture."""
        prefix = f"model.layers.{layer}.mlp."
        if not self._is(self.config.moe_layers, layer):
            return self._mlp(prefix)
        return MoeWeights(
            router=self._read(prefix + "gate.weight").float(),
            correction_bias=self._read(prefix + "gate.e_score_correction_bias", torch.float32),
            experts=self._experts(prefix),
            expert_ids=self._expert_ids,
            shared=self._mlp(prefix + "shared_experts."),
        )

    def _experts(self, prefix: str) -> MlpWeights:
        """The rank's, each put in its place as it is read: a layer's experts are more than a file holds, and never
        here twice."""
        stacked: tuple[torch.Tensor, ...] = ()
        for place, expert in enumerate(self._expert_ids):
            own = self._mlp(f"{prefix}experts.{expert}.")
            parts = own.gate_up, own.down
            stacked = stacked or tuple(part.new_empty(len(self._expert_ids), *part.shape) for part in parts)
            for whole, part in zip(stacked, parts, strict=True):
                whole[place] = part
        return MlpWeights(*stacked)

    def stored_mlp(self, layer: int) -> MlpOf[Stored] | MoeWeights | PackedMoeWeights:
        """As `packed_mlp`, with the matrices of a dense MLP in e4m3 as they are stored."""
        if self._is(self.config.moe_layers, layer):
            return self.packed_mlp(layer)
        gate, up, down = (f"model.layers.{layer}.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down"))
        return MlpOf(self._stored(gate, up), self._stored(down))

    def packed_mlp(self, layer: int) -> MlpWeights | MoeWeights | PackedMoeWeights:
        """As `mlp`, but a mixture whose experts are all stored in NVFP4 keeps them so."""
        prefix = f"model.layers.{layer}.mlp."
        if not self._is(self.config.moe_layers, layer):
            return self._mlp(prefix)
        experts = self._packed_experts(prefix)
        return self.mlp(layer) if experts is None else self._packed(prefix, experts)

    def fp4_mlp(self, layer: int) -> PackedMoeWeights | None:
        """A mixture laid out for products in FP4; None if its experts are not all stored for that in NVFP4."""
        prefix = f"model.layers.{layer}.mlp."
        experts = self._fp4_experts(prefix) if self._is(self.config.moe_layers, layer) else None
        return None if experts is None else self._packed(prefix, experts)

    def _packed(self, prefix: str, experts: PackedExperts | w4a4.Experts) -> PackedMoeWeights:
        bias = self._read(prefix + "gate.e_score_correction_bias", torch.float32)
        return PackedMoeWeights(
            self._read(prefix + "gate.weight"), bias, experts, self._mlp(prefix + "shared_experts.")
        )

    def _fp4_experts(self, prefix: str) -> w4a4.Experts | None:
        """None as `_packed_experts`, without scales for inputs, or if the kernels do not divide them."""
        up_gates, downs = list[Calibrated](), list[Calibrated]()
        for expert in self._expert_ids:
            names = [f"{prefix}experts.{expert}.{kind}_proj.weight" for kind in ("gate", "up", "down")]
            gate, up, down = (self._checkpoint.calibrated(name, self._part_of(name)) for name in names)
            if gate is None or up is None or down is None or not torch.equal(gate.weight.scale_2, up.weight.scale_2):
                return None
            parts = (up.weight, gate.weight)
            joined = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
            input_scale = torch.maximum(gate.input_scale, up.input_scale)
            up_gates.append(Calibrated(Nvfp4Tensor(*joined, gate.weight.scale_2), input_scale))
            downs.append(down)
        return stacked(up_gates, downs)

    def _packed_experts(self, prefix: str) -> PackedExperts | None:
        """None if one is stored otherwise, or if the scales of a gate and its up differ."""
        gate_ups, downs = list[Nvfp4Tensor](), list[Nvfp4Tensor]()
        for expert in self._expert_ids:
            names = [f"{prefix}experts.{expert}.{kind}_proj.weight" for kind in ("gate", "up", "down")]
            gate, up, down = (self._checkpoint.nvfp4(name, self._part_of(name)) for name in names)
            if gate is None or up is None or down is None or not torch.equal(gate.scale_2, up.scale_2):
                return None
            joined = torch.cat((gate.codes, up.codes)), torch.cat((gate.scale, up.scale))
            gate_ups.append(Nvfp4Tensor(*joined, gate.scale_2))
            downs.append(down)
        return gate_ups, downs

    def mtp(self) -> MtpWeights:
        """What the first layer behind the model has besides a layer's weights."""
        prefix, read = f"model.layers.{self.config.num_layers}.", self._read
        return MtpWeights(
            embedding_norm=read(prefix + "enorm.weight"),
            state_norm=read(prefix + "hnorm.weight"),
            join=read(prefix + "eh_proj.weight"),
            output_norm=read(prefix + "shared_head.norm.weight"),
        )

    def _is(self, layers: tuple[bool, ...], layer: int) -> bool:
        """An MTP layer, behind the others, selects for itself and is a mixture."""
        return layer >= len(layers) or layers[layer]

    def _mlp(self, prefix: str) -> MlpWeights:
        read = self._read
        gate_up = torch.cat([read(prefix + "gate_proj.weight"), read(prefix + "up_proj.weight")])
        return MlpWeights(gate_up, read(prefix + "down_proj.weight"))
