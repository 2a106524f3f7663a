"""A layer of a GLM-5 decoder on a GPU: for few rows at the speed of reading its weights, for many by large products.

The residual is added where the next norm is computed, so a layer takes and leaves (x, delta), x + delta being its input
and output. `cuda_glm_weights` says what it is computed with. The twin is `glm_layer.GlmLayer`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from shared.engine.kernels import (
    cuda_fp8,
    gluon_experts,
    gluon_rows,
    gluon_state,
    inputs,
    triton_dense,
    triton_index,
    triton_latent,
    triton_moved,
    triton_prompt,
    triton_queries,
    triton_route,
)
from shared.engine.kernels.cuda_fp8 import Fp8Matrix
from shared.engine.kernels.cuda_latent import CudaLatent
from shared.engine.kernels.experts import Experts
from shared.engine.kernels.gluon_rows import MAX_ROWS
from shared.engine.kernels.inputs import Norm, Rows, Selected, Span
from shared.engine.kernels.triton_queries import Dims
from shared.engine.layers.cuda_glm_weights import MIXED_ROWS, Attention, Fp4Experts, Layer, Matrix, Mixture
from shared.engine.models.glm_config import GlmConfig
from shared.engine.parallel.group import Group

MOST_FEW = 4
SELECTING_ROWS = 256  # at a time, so that their scores stay small


@dataclass(frozen=True, slots=True)
class Step:
    """What all layers of a step share. No row sees more than `capacity` tokens. With `pdl` kernels start before those
    in front have ended, which is faster; without, a profile says what each takes. `latent` selects, and serves few
    rows' attention, if it is there. `spans` are rows that are computed together, in their order."""

    config: GlmConfig
    group: Group
    rows: Rows
    selected: Selected
    capacity: int
    pdl: bool = True
    latent: CudaLatent | None = None
    spans: tuple[Span, ...] = ()

    def parts(self, num_rows: int) -> Iterator[tuple[slice, Span | None]]:
        """Spans, and the rows between them."""
        at = 0
        for span in self.spans:
            if at < span.first:
                yield slice(at, span.first), None
            yield span.rows, span
            at = span.last
        if at < num_rows:
            yield slice(at, num_rows), None


@dataclass(frozen=True, slots=True)
class State:
    """One layer's view of the pool: latents [pages, page_size, latent_dim]; index keys [pages, page_size, index_dim]
    where the layer selects, and whether it is the first of the step to do so."""

    latents: torch.Tensor
    keys: torch.Tensor | None
    selects_first: bool


def forward(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    layer: Layer,
    state: State,
    step: Step,
    going_on: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and delta [T, hidden] (None: nothing to add) to those behind the layer. Writes the step's state; of many rows,
    what was x is overwritten.

    Of a last layer not all rows may be of use: only those `going_on`, int64 [S], are computed further than their state
    and returned. The step's selection is then theirs.
    """
    low, x = _normed(x, layer.attention.down, Norm(layer.input_norm, step.config.rms_norm_eps, delta), step)
    q = _queries(low, layer.attention, state, step)
    if going_on is not None:
        if not len(going_on):
            return x[:0], x[:0]
        rows = step.rows
        low, q, x, positions, slots, starts, cos, sin = triton_moved.taken(
            going_on, (low, q, x, rows.positions, rows.own_slots, rows.starts, rows.cos, rows.sin)
        )
        step = replace(step, rows=Rows(positions, slots, starts, rows.page_ids, cos, sin), spans=())
    delta = step.group.sum(_attend(low, q, layer.attention, state, step, early=going_on is None))
    norm = Norm(layer.post_norm, step.config.rms_norm_eps, delta)
    if isinstance(layer.mlp, Mixture):
        logits, x, normed = _kept(x, layer.mlp.router, norm, step, layer.mlp.activations(len(x)))
        return x, step.group.sum(_mix(logits, normed, layer.mlp, step))
    inner, x = _normed(x, layer.mlp.gate_up, norm, step)
    return x, step.group.sum(plain(triton_dense.silu_mul(inner), layer.mlp.down, pdl=step.pdl))


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
    """As `gluon_rows.linear_keeping`, of any number of rows; of many, `x` itself becomes the sum."""
    if len(x) <= MAX_ROWS:
        return gluon_rows.linear_keeping(x, weight, norm, kept=kept, pdl=step.pdl)
    normed = triton_dense.add_rms_norm(x, norm.delta, norm.gain, norm.eps)
    product: torch.Tensor = torch.mm(normed, weight.T, out_dtype=torch.float32)  # a router's logits must not be rounded
    return product, x, normed.to(kept)


def logits(x: torch.Tensor, head: Matrix, *, pdl: bool) -> torch.Tensor:
    """x [T, hidden] times head' [V, hidden], float32."""
    if isinstance(head, Fp8Matrix):
        if 0 < len(x) <= cuda_fp8.MAX_ROWS:
            return head.kernels.linear(x, head.weight, pdl=pdl)
        head = _in_bfloat16(head, pdl=pdl)
    if 0 < len(x) <= MAX_ROWS:
        return gluon_rows.linear(x, head, pdl=pdl)
    return F.linear(x, head).float()


def plain(x: torch.Tensor, weight: Matrix, *, pdl: bool) -> torch.Tensor:
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
    if not step.spans:
        attended = _attended(low, q, weights, state, step, None, early=early)
    else:
        found = [
            _attended(
                low[rows], q[rows], weights, state,
                replace(step, rows=step.rows.part(rows), selected=step.selected.part(rows)), span, early=False,
            )
            for rows, span in step.parts(len(low))
        ]  # fmt: skip
        attended = torch.cat(found) if len(found) > 1 else found[0]
    return plain(attended, weights.output, pdl=step.pdl)


def _attended(
    low: torch.Tensor, q: torch.Tensor, weights: Attention, state: State, step: Step, span: Span | None, *, early: bool
) -> torch.Tensor:
    """[T, H * v] of a step's rows, all of a `span` or none."""
    config, full, dims = step.config, weights.key_norm is not None, _dims(step.config)
    dense = span is not None and span.attended_together
    capacity = span.context if span else step.capacity
    queries = triton_queries.prepare(
        q, step.rows, dims, weights.up_key, full=full, absorbed=not dense, pdl=step.pdl
    )  # fmt: skip
    selects = capacity > config.index_topk or (state.selects_first and not dense)
    if selects and queries.index is not None and state.keys is not None:
        head_weights = low[:, dims.q_lora + dims.latent + dims.rope + dims.index_dim :]
        _select(queries.index, head_weights, state.keys, step, span, first=state.selects_first)
        if span is not None:
            triton_prompt.mark(span, step.selected, state.latents.shape[1])
    scale = config.qk_head_dim**-0.5
    if span is not None and dense:
        seen = triton_prompt.context(state.latents, span, weights.up_key, weights.up_value)
        return triton_prompt.attend(q, queries.rope, seen, step.rows.positions, span.bits, scale)
    return triton_latent.attend(
        queries, state.latents, step.selected, weights.up_value, scale, step.latent,
        early=early and not selects and len(low) <= MAX_ROWS, late=not isinstance(weights.output, Fp8Matrix),
        pdl=step.pdl,
    )  # fmt: skip


def _select(
    q: torch.Tensor, head_weights: torch.Tensor, keys: torch.Tensor, step: Step, span: Span | None, *, first: bool
) -> None:
    """Block by block, so that the scores of a prompt stay small."""
    for at in range(0, len(q), SELECTING_ROWS):
        block = slice(at, at + SELECTING_ROWS)
        unseen = max(0, len(q) - at - SELECTING_ROWS) if span else 0  # by the last of a block
        triton_index.select(
            q[block], head_weights[block], keys, step.rows.part(block), step.selected.part(block),
            (span.context if span else step.capacity) - unseen, step.latent,
            first=first, together=span is not None, pdl=step.pdl,
        )  # fmt: skip


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
        inner = triton_dense.silu_mul(plain(normed, shared.gate_up, pdl=pdl))
        return own.products.experts(normed, own.experts, chosen, factors) + plain(inner, shared.down, pdl=pdl)
    if len(normed) <= MIXED_ROWS:
        return gluon_experts.mixture(normed, chosen, factors, weights.experts, weights.shared, pdl=pdl)
    return gluon_experts.large_mixture(normed, chosen, factors, weights.experts, weights.shared)


def _dims(config: GlmConfig) -> Dims:
    return Dims(
        config.num_heads, config.q_lora_rank, config.kv_lora_rank, config.qk_nope_head_dim, config.qk_rope_head_dim,
        config.index_num_heads, config.index_head_dim,
    )  # fmt: skip
