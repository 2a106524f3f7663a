"""What a layer of a GLM-5 decoder on a GPU is computed with (`cuda_glm_layer`): a checkpoint's weights, joined and laid
out for its kernels, and which kernels these are.

What every product of one input needs is one matrix: `down` is q_a, kv_a and, where the layer selects, the indexer's wk
and weights_proj; `query` is q_b and the indexer's wq_b.
"""

from dataclasses import dataclass, replace

import torch

from shared.engine.kernels import cuda_experts, cuda_few, gluon_experts, w4a4, w8a16
from shared.engine.kernels.cuda_experts import CudaExperts
from shared.engine.kernels.cuda_few import CudaFew
from shared.engine.kernels.cuda_fp8 import CudaFp8, Fp8Matrix
from shared.engine.kernels.experts import Experts, SharedExpert
from shared.engine.kernels.inputs import KeyNorm
from shared.engine.layers.mla import KEY_NORM_EPS
from shared.engine.models.glm_config import GlmConfig
from shared.engine.models.glm_weights import AttentionOf, MlpOf, MlpWeights, MoeWeights, PackedMoeWeights, Stored
from shared.engine.quantization.packed_experts import packed

MIXED_ROWS = gluon_experts.MAX_TOKENS
LEAST_GROUPED = 32  # rows; fewer seldom choose the same expert (docs/LOG.md)

Matrix = torch.Tensor | Fp8Matrix  # in bfloat16, or in e4m3 as it is stored


@dataclass(frozen=True, slots=True)
class Attention:
    """As AttentionWeights, joined as above."""

    down: Matrix
    query_norm: torch.Tensor
    query: Matrix
    latent_norm: torch.Tensor
    up_key: torch.Tensor
    up_value: torch.Tensor
    output: Matrix
    key_norm: KeyNorm | None


@dataclass(frozen=True, slots=True)
class Dense:
    """As MlpWeights."""

    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True, slots=True)
class Fp4Experts:
    """Experts for products in FP4, and who computes these."""

    experts: w4a4.Experts
    products: w4a4.Products


@dataclass(frozen=True, slots=True)
class Mixture:
    """As MoeWeights. The router is kept as the checkpoint has it, in bfloat16: its products with bfloat16 are exact in
    float32. `few` and `grouped` compute steps of the fewest and of some tokens, if they can and are there."""

    router: torch.Tensor
    correction_bias: torch.Tensor
    experts: Experts | Fp4Experts
    shared: SharedExpert
    grouped: CudaExperts | None = None
    few: CudaFew | None = None

    def grouping(self, num_rows: int) -> CudaExperts | None:
        """Who computes so many rows by groups of those that chose the same expert."""
        return self.grouped if LEAST_GROUPED <= num_rows <= MIXED_ROWS else None

    def activations(self, num_rows: int) -> torch.dtype:
        """What so many rows go into the experts as."""
        if num_rows > MIXED_ROWS or not isinstance(self.experts, Experts):
            return torch.bfloat16
        return gluon_experts.activations(self.experts)


@dataclass(frozen=True, slots=True)
class Layer:
    """The weights of a layer, on the device."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    attention: Attention
    mlp: Dense | Mixture


def attention(weights: AttentionOf[Stored], fp8: CudaFp8 | None = None) -> Attention:
    """Join what is computed together. `fp8` multiplies what is all in e4m3."""
    indexer = weights.indexer
    down, query = [weights.down], [weights.query]
    if indexer is not None:
        down.append(indexer.key)
        query.append(indexer.query)
    gain, bias = (part.float() for part in indexer.key_norm) if indexer else (None, None)
    return Attention(
        joined(down, fp8, indexer.head_weights if indexer else None),
        weights.query_norm,
        joined(query, fp8),
        weights.latent_norm,
        weights.up_key,
        weights.up_value,
        joined([weights.output], fp8),
        None if gain is None or bias is None else KeyNorm(gain, bias, KEY_NORM_EPS),
    )


def joined(parts: list[Stored], fp8: CudaFp8 | None, behind: torch.Tensor | None = None) -> Matrix:
    """One below the other, and behind them rows that no checkpoint has in e4m3."""
    narrow = [part for part in parts if isinstance(part, w8a16.Weight)]
    if fp8 is not None and len(narrow) == len(parts):
        return Fp8Matrix(w8a16.join(narrow, behind), fp8)
    wide = [w8a16.unpack(part, torch.bfloat16) if isinstance(part, w8a16.Weight) else part for part in parts]
    return torch.cat(wide if behind is None else [*wide, behind])


def sharing(own: Attention, config: GlmConfig) -> Attention:
    """The same without what selects, for steps that keep a selection."""
    num_low, num_query = config.q_lora_rank + config.latent_dim, config.num_heads * config.qk_head_dim
    return replace(own, down=_first(own.down, num_low), query=_first(own.query, num_query), key_norm=None)


def _first(matrix: Matrix, num_rows: int) -> Matrix:
    return matrix.first(num_rows) if isinstance(matrix, Fp8Matrix) else matrix[:num_rows]


def dense(weights: MlpOf[Stored], fp8: CudaFp8 | None = None) -> Dense:
    """As `attention`."""
    return Dense(joined([weights.gate_up], fp8), joined([weights.down], fp8))


def mixture(weights: MoeWeights | PackedMoeWeights, fp4: w4a4.Products | None = None) -> Mixture:
    """With experts packed if they are stored in NVFP4; `fp4` computes those that were read for products in FP4."""
    shared = SharedExpert(weights.shared.gate_up, weights.shared.down)
    return Mixture(weights.router.to(shared.down.dtype), weights.correction_bias, _experts(weights, fp4), shared)


def grouping(layer: Layer, top_k: int, kernels: CudaExperts | None, few: CudaFew | None = None) -> Layer:
    """The layer, whose mixture is computed by `kernels` and `few` if it is one for them. Raises Unsupported for NVFP4
    experts behind a norm that may give too large values."""
    mlp = layer.mlp
    if not isinstance(mlp, Mixture) or not isinstance(mlp.experts, Experts) or mlp.experts.factors is None:
        return layer
    gluon_experts.require_small(layer.post_norm)
    experts, shared = mlp.experts, mlp.shared
    if kernels is not None and cuda_experts.suits(experts, shared, top_k):
        mlp = replace(mlp, grouped=kernels)
    narrow = isinstance(layer.attention.output, Fp8Matrix)  # beside others it is slower (docs/decisions/0069)
    if few is not None and narrow and cuda_few.suits(experts, shared, top_k):
        mlp = replace(mlp, few=few)
    return replace(layer, mlp=mlp)


def _experts(weights: MoeWeights | PackedMoeWeights, fp4: w4a4.Products | None) -> Experts | Fp4Experts:
    stored = weights.experts
    if isinstance(stored, w4a4.Experts):
        assert fp4 is not None, "they were read for it"
        return Fp4Experts(stored, fp4)
    return Experts(stored.gate_up, stored.down) if isinstance(stored, MlpWeights) else packed(*stored)
