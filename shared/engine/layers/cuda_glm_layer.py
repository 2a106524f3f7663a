"""A layer of a GLM-5 decoder on a GPU: for few rows at the speed of reading its weights, for many by large products.

What every product of one input needs is one matrix: `down` is q_a, kv_a and, where the layer selects, the indexer's wk
and weights_proj; `query` is q_b and the indexer's wq_b. The residual is added where the next norm is computed, so a
layer takes and leaves (x, delta), x + delta being its input and output. The twin is `glm_layer.GlmLayer`.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from shared.engine.kernels import (
    cuda_experts,
    cuda_few,
    cuda_fp8,
    gluon_experts,
    gluon_rows,
    gluon_state,
    inputs,
    triton_dense,
    triton_index,
    triton_latent,
    triton_queries,
    triton_route,
    w4a4,
    w8a16,
)
from shared.engine.kernels.cuda_experts import CudaExperts
from shared.engine.kernels.cuda_few import CudaFew
from shared.engine.kernels.cuda_fp8 import CudaFp8, Fp8Matrix
from shared.engine.kernels.cuda_latent import CudaLatent
from shared.engine.kernels.experts import Experts, SharedExpert
from shared.engine.kernels.gluon_rows import MAX_ROWS
from shared.engine.kernels.inputs import KeyNorm, Norm, Rows, Selected
from shared.engine.kernels.triton_queries import Dims
from shared.engine.layers.mla import KEY_NORM_EPS
from shared.engine.models.glm_config import GlmConfig
from shared.engine.models.glm_weights import AttentionOf, MlpOf, MlpWeights, MoeWeights, PackedMoeWeights, Stored
from shared.engine.parallel.group import Group
from shared.engine.quantization.packed_experts import packed

MIXED_ROWS = gluon_experts.MAX_TOKENS
LEAST_GROUPED = 32  # rows; fewer seldom choose the same expert (docs/LOG.md)
MOST_FEW = 4
SELECTING_ROWS = 256  # at a time, so that their scores stay small


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


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share. No row sees more than `capacity` tokens. With `pdl` kernels start before those
    in front have ended, which is faster; without, a profile says what each takes. `latent` selects, and serves few
    rows' attention, if it is there."""

    config: GlmConfig
    group: Group
    rows: Rows
    selected: Selected
    capacity: int
    pdl: bool = True
    latent: CudaLatent | None = None


@dataclass(frozen=True, slots=True)
class State:
    """One layer's view of the pool: latents [pages, page_size, latent_dim]; index keys [pages, page_size, index_dim]
    where the layer selects, and whether it is the first of the step to do so."""

    latents: torch.Tensor
    keys: torch.Tensor | None
    selects_first: bool


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
    what = mlp.experts, mlp.shared, top_k
    grouped = kernels if kernels is not None and cuda_experts.suits(*what) else None
    narrow = isinstance(layer.attention.output, Fp8Matrix)  # beside others `few` is slower (docs/decisions/0069)
    own = few if few is not None and narrow and cuda_few.suits(*what) else None
    return replace(layer, mlp=replace(mlp, grouped=grouped, few=own))


def _experts(weights: MoeWeights | PackedMoeWeights, fp4: w4a4.Products | None) -> Experts | Fp4Experts:
    stored = weights.experts
    if isinstance(stored, w4a4.Experts):
        assert fp4 is not None, "they were read for it"
        return Fp4Experts(stored, fp4)
    return Experts(stored.gate_up, stored.down) if isinstance(stored, MlpWeights) else packed(*stored)


def forward(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    layer: Layer,
    state: State,
    step: Step,
    going_on: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and delta [T, hidden] (None: nothing to add) to those behind the layer. Writes the step's state.

    Of a last layer not all rows may be of use: only those `going_on`, int64 [S], are computed further than their state
    and returned. The step's selection is then theirs.
    """
    low, x = _normed(x, layer.attention.down, Norm(layer.input_norm, step.config.rms_norm_eps, delta), step)
    q = _queries(low, layer.attention, state, step)
    if going_on is not None:
        low, q, x = low[going_on], q[going_on], x[going_on]
        if not len(x):
            return x, x
        step = replace(step, rows=step.rows.some(going_on))
    delta = step.group.sum(_attend(low, q, layer.attention, state, step, early=going_on is None))
    norm = Norm(layer.post_norm, step.config.rms_norm_eps, delta)
    if isinstance(layer.mlp, Mixture):
        logits, x, normed = _kept(x, layer.mlp.router, norm, step, layer.mlp.activations(len(x)))
        return x, step.group.sum(_mix(logits, normed, layer.mlp, step))
    inner, x = _normed(x, layer.mlp.gate_up, norm, step)
    return x, step.group.sum(_plain(triton_dense.silu_mul(inner), layer.mlp.down, pdl=step.pdl))


def _normed(x: torch.Tensor, weight: Matrix, norm: Norm, step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] behind `norm`, times weight' [N, K], float32; and the sum that was normed, bfloat16 [T, K]."""
    if isinstance(weight, Fp8Matrix) and len(x) <= cuda_fp8.MAX_ROWS:
        return weight.kernels.linear_keeping(x, weight.weight, norm, pdl=step.pdl)
    product, total, _ = _kept(x, _in_bfloat16(weight, pdl=step.pdl), norm, step)
    return product, total


def _in_bfloat16(weight: Matrix, *, pdl: bool) -> torch.Tensor:
    """Made anew each time of a matrix in e4m3: many rows are worth it."""
    return weight.kernels.plain(weight.weight, pdl=pdl) if isinstance(weight, Fp8Matrix) else weight


def _kept(
    x: torch.Tensor, weight: torch.Tensor, norm: Norm, step: Step, kept: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `gluon_rows.linear_keeping`, of any number of rows."""
    if len(x) <= MAX_ROWS:
        return gluon_rows.linear_keeping(x, weight, norm, kept=kept, pdl=step.pdl)
    total = x.clone()
    normed = triton_dense.add_rms_norm(total, norm.delta, norm.gain, norm.eps)
    product: torch.Tensor = torch.mm(normed, weight.T, out_dtype=torch.float32)  # a router's logits must not be rounded
    return product, total, normed.to(kept)


def logits(x: torch.Tensor, head: torch.Tensor, *, pdl: bool) -> torch.Tensor:
    """x [T, hidden] times head' [V, hidden], float32."""
    if 0 < len(x) <= MAX_ROWS:
        return gluon_rows.linear(x, head, pdl=pdl)
    return F.linear(x, head).float()


def behind_norm(x: torch.Tensor, gain: torch.Tensor, weight: torch.Tensor, step: Step) -> torch.Tensor:
    """x [T, K] behind its norm, times weight' [N, K], bfloat16."""
    if len(x) <= MAX_ROWS:
        return gluon_rows.linear(x, weight, Norm(gain, step.config.rms_norm_eps), weight.dtype, pdl=step.pdl)
    return F.linear(triton_dense.add_rms_norm(x, None, gain, step.config.rms_norm_eps), weight)


def _plain(x: torch.Tensor, weight: Matrix, *, pdl: bool) -> torch.Tensor:
    """x [T, K] times weight' [N, K], bfloat16."""
    if isinstance(weight, Fp8Matrix):
        if len(x) <= cuda_fp8.MAX_ROWS:
            return weight.kernels.linear(x, weight.weight, dtype=torch.bfloat16, pdl=pdl)
        weight = _in_bfloat16(weight, pdl=pdl)
    if len(x) <= MAX_ROWS:
        return gluon_rows.linear(x, weight, dtype=weight.dtype, pdl=pdl)
    return F.linear(x.to(weight.dtype), weight)


def _queries(low: torch.Tensor, weights: Attention, state: State, step: Step) -> torch.Tensor:
    """`query`'s product, from `down`'s. Writes the rows' state."""
    config, num_low = step.config, step.config.q_lora_rank
    kept = inputs.State(state.latents, weights.latent_norm, config.latent_norm_eps, state.keys, weights.key_norm)
    query, query_norm = weights.query, Norm(weights.query_norm, config.latent_norm_eps)
    if isinstance(query, Fp8Matrix):
        if len(low) <= cuda_fp8.MAX_ROWS:
            return query.kernels.queries_and_state(low, query.weight, query_norm, step.rows, kept, pdl=step.pdl)
        query = _in_bfloat16(query, pdl=step.pdl)
    if len(low) <= MAX_ROWS:
        return gluon_state.queries_and_state(low, query, query_norm, step.rows, kept, pdl=step.pdl)
    gluon_state.append(low, num_low, step.rows, kept)
    q_low = triton_dense.add_rms_norm(low[:, :num_low].bfloat16(), None, weights.query_norm, config.latent_norm_eps)
    return F.linear(q_low, query)


def _attend(
    low: torch.Tensor, q: torch.Tensor, weights: Attention, state: State, step: Step, *, early: bool
) -> torch.Tensor:
    """This rank's part of attention [T, hidden], from both products. `early`: `_queries` was the last kernel."""
    config, norm, dims = step.config, weights.key_norm, _dims(step.config)
    queries = triton_queries.prepare(
        q, step.rows, dims, weights.up_key, full=norm is not None, pdl=step.pdl
    )  # fmt: skip
    selects = state.selects_first or (state.keys is not None and step.capacity > config.index_topk)
    if selects and queries.index is not None and state.keys is not None:
        head_weights = low[:, dims.q_lora + dims.latent + dims.rope + dims.index_dim :]
        _select(queries.index, head_weights, state.keys, step, first=state.selects_first)
    attended = triton_latent.attend(
        queries, state.latents, step.selected, weights.up_value, config.qk_head_dim**-0.5, step.latent,
        early=early and not selects and len(low) <= MAX_ROWS, late=not isinstance(weights.output, Fp8Matrix),
        pdl=step.pdl,
    )  # fmt: skip
    return _plain(attended, weights.output, pdl=step.pdl)


def _select(q: torch.Tensor, head_weights: torch.Tensor, keys: torch.Tensor, step: Step, *, first: bool) -> None:
    """Block by block, so that the scores of a prompt stay small."""
    for at in range(0, len(q), SELECTING_ROWS):
        block, rows, chosen = slice(at, at + SELECTING_ROWS), step.rows, step.selected
        own = Rows(rows.positions[block], rows.own_slots[block], rows.starts[block], rows.page_ids, rows.cos, rows.sin)
        selected = Selected(chosen.slots[block], chosen.counts[block])
        triton_index.select(
            q[block], head_weights[block], keys, own, selected, step.capacity, step.latent, first=first, pdl=step.pdl
        )


def _mix(logits: torch.Tensor, normed: torch.Tensor, weights: Mixture, step: Step) -> torch.Tensor:
    """This rank's part of the mixture [T, hidden], from the router's product and its input."""
    config, pdl, bias = step.config, step.pdl, weights.correction_bias
    top_k, factor, normalize = config.num_experts_per_token, config.routed_scaling_factor, config.normalize_top_k
    if isinstance(weights.experts, Experts):
        if grouped := weights.grouping(len(normed)):
            choice = grouped.route(logits, bias, top_k, factor, normalize=normalize, pdl=pdl)
            return grouped(normed, choice, weights.experts, weights.shared, pdl=pdl)
        if weights.few and len(normed) <= MOST_FEW:
            return weights.few(
                normed, logits, bias, factor, weights.experts, weights.shared, normalize=normalize, pdl=pdl
            )  # fmt: skip
    chosen, factors = triton_route.route(logits, bias, top_k, factor, normalize=normalize, pdl=pdl)
    if isinstance(weights.experts, Fp4Experts):
        own, shared = weights.experts, weights.shared
        inner = triton_dense.silu_mul(_plain(normed, shared.gate_up, pdl=pdl))
        return own.products.experts(normed, own.experts, chosen, factors) + _plain(inner, shared.down, pdl=pdl)
    if len(normed) <= MIXED_ROWS:
        return gluon_experts.mixture(normed, chosen, factors, weights.experts, weights.shared, pdl=pdl)
    return gluon_experts.large_mixture(normed, chosen, factors, weights.experts, weights.shared)


def _dims(config: GlmConfig) -> Dims:
    return Dims(
        config.num_heads, config.q_lora_rank, config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim,
        config.index_num_heads, config.index_head_dim,
    )  # fmt: skip


def obstacle(config: GlmConfig, dtype: torch.dtype, kv_dtype: str, capability: tuple[int, int]) -> str | None:
    """What keeps these kernels from serving a model, or a rank's share of it."""
    if capability < (9, 0):
        return f"they need compute capability 9.0, and this GPU has {capability[0]}.{capability[1]}"
    if dtype != torch.bfloat16 or kv_dtype != "bfloat16":
        return f"they compute and keep KV in bfloat16, not in {str(dtype).removeprefix('torch.')} and {kv_dtype}"
    if config.num_groups > 1:
        return "they choose experts from all, not from groups"
    for name, size in (
        ("kv_lora_rank", config.kv_lora_rank),
        ("qk_rope_head_dim", config.qk_rope_head_dim),
        ("index_head_dim", config.index_head_dim),
        ("index_n_heads", config.index_num_heads),
        ("index_topk", config.index_topk),
        ("n_routed_experts", config.num_experts),
        ("num_experts_per_tok", config.num_experts_per_token),
    ):
        if size & (size - 1) or (size < 16 and "expert" not in name):
            return f"{name} is {size}, no power of two of at least 16"
    for name, size, multiple in (
        ("qk_nope_head_dim", config.qk_nope_head_dim, 16),
        ("v_head_dim", config.v_head_dim, 32),
        ("hidden_size", config.hidden_size, 256),
        ("q_lora_rank", config.q_lora_rank, 256),
        ("a rank's heads times v_head_dim", config.num_heads * config.v_head_dim, 256),
        ("a rank's intermediate_size", config.intermediate_size, 256),
        ("a rank's moe_intermediate_size", 256, 256),
    ):
        if size % multiple:
            return f"{name} is {size}, no multiple of {multiple}"
    return None
