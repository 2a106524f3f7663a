"""A layer of a GLM-5 decoder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from shared.engine.kernels import reference, sparse_reference
from shared.engine.kernels.sparse_reference import Placed, Rows, Select, Selection
from shared.engine.layers.linear import Linear
from shared.engine.layers.mla import LatentAttention
from shared.engine.layers.moe import Mlp, Moe
from shared.engine.models.glm_weights import GlmWeights, MlpWeights
from shared.engine.parallel.group import Group

# As GlmLayer: (x, turns, step, latents, index_keys, selection) -> (x, selection).
Layer = Callable[[torch.Tensor, torch.Tensor, Placed, Rows, Rows | None, Selection], tuple[torch.Tensor, Selection]]


class Parts(Protocol):
    """What a model is made of, of one kind."""

    def layer(self, weights: GlmWeights, layer: int, group: Group) -> Layer:
        """The layer of this number."""

    def linear(self, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        """x [T, K] -> x W' [T, N], any float, of weight [N, K]."""


class GlmLayer:
    """x [T, hidden] -> [T, hidden]: attention and MLP, each behind a norm and beside a residual; in torch. With `fp4`
    routed experts multiply in FP4, if they are stored for it. `select` is the kernel of its indexer, if it has one."""

    def __init__(self, weights: GlmWeights, layer: int, group: Group, select: Select, *, fp4: bool = False) -> None:
        config = weights.config
        self.eps = config.rms_norm_eps
        self.input_norm, self.post_norm = weights.norms(layer)
        self.attention = LatentAttention(config, weights.attention(layer), group, select)
        mlp = (weights.fp4_mlp(layer) if fp4 else None) or weights.mlp(layer)
        self.mlp = Mlp(mlp, group) if isinstance(mlp, MlpWeights) else Moe(config, mlp, group)

    def __call__(
        self,
        x: torch.Tensor,
        turns: torch.Tensor,
        step: Placed,
        latents: Rows,
        index_keys: Rows | None,
        selection: Selection,
    ) -> tuple[torch.Tensor, Selection]:
        """What is not x as in LatentAttention."""
        normed = reference.rms_norm(x, self.input_norm, self.eps)
        attended, selection = self.attention(normed, turns, step, latents, index_keys, selection)
        x = x + attended
        return x + self.mlp(reference.rms_norm(x, self.post_norm, self.eps)), selection


@dataclass(frozen=True, slots=True)
class TorchParts:
    """Satisfies `Parts`; the fields are GlmLayer's."""

    select: Select = sparse_reference.select
    fp4: bool = False

    def layer(self, weights: GlmWeights, layer: int, group: Group) -> GlmLayer:
        """See `Parts`."""
        return GlmLayer(weights, layer, group, self.select, fp4=self.fp4)

    def linear(self, weight: torch.Tensor) -> Linear:
        """See `Parts`."""
        return Linear(weight)
