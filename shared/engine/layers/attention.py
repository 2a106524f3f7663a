"""Rotary grouped-query attention over paged keys and values, optionally with RMSNorm on queries and keys."""

import torch

from shared.engine.batch import Batch
from shared.engine.kernels import reference
from shared.engine.layers.linear import Linear, RowLinear
from shared.engine.models.config import DenseConfig
from shared.engine.models.weights import Fp4Weights
from shared.engine.parallel.group import Group

Rope = tuple[torch.Tensor, torch.Tensor]


class Attention:
    """x [T, hidden] -> [T, hidden]; writes the step's keys and values into `kv` [pages, 2, Hkv, page_size, D]."""

    def __init__(self, config: DenseConfig, weights: Fp4Weights, group: Group) -> None:
        self.heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        self.head_dim, self.eps = config.head_dim, config.rms_norm_eps
        self.q_norm, self.k_norm = weights.q_norm, weights.k_norm
        self.qkv = Linear(weights.qkv, weights.qkv_bias)
        self.output = RowLinear(weights.output, weights.output_bias, group)

    def __call__(self, x: torch.Tensor, rope: Rope, batch: Batch, kv: torch.Tensor) -> torch.Tensor:
        """Attend."""
        q, k, v = self.qkv(x).view(-1, sum(self.heads), self.head_dim).split(self.heads, dim=1)
        q = reference.rotate(self._norm(q, self.q_norm), *rope)
        reference.append_kv(kv, reference.rotate(self._norm(k, self.k_norm), *rope), v, batch)
        return self.output(reference.paged_attention(q, kv, batch).flatten(1))

    def _norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        return x if weight is None else reference.rms_norm(x, weight, self.eps)
