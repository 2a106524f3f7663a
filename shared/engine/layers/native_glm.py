"""A GLM-5 layer in one native call: twin of `layers.glm_layer`, for the CPU.

Every sum is taken in an order that depends on the token alone, so results are equal to the bit however a sequence is
chunked, batched or cached.
"""

import ctypes

import torch

from shared.engine.kernels import native, native_glm
from shared.engine.kernels.native_glm import ATTENTION, MLP
from shared.engine.kernels.sparse_reference import Placed, Rows, Selection
from shared.engine.layers import native_indexer
from shared.engine.layers.mla import KEY_NORM_EPS
from shared.engine.models.glm_config import GlmConfig
from shared.engine.models.glm_weights import GlmWeights, MoeWeights
from shared.engine.parallel.group import Group
from shared.engine.quantization.rows import FloatRows

MAX_ROPE_DIM = 512


def obstacle(config: GlmConfig, dtype: torch.dtype, kv_format: str) -> str | None:
    """What keeps the kernels from computing layers of this shape in `dtype`, with pages in this form."""
    if kv_format != str(dtype).removeprefix("torch."):
        return f"pages in {kv_format}"
    if config.kv_lora_rank % 16:
        return f"latents of {config.kv_lora_rank}, which is not a multiple of 16"
    pairs = (config.qk_nope_head_dim, config.v_head_dim, config.q_lora_rank, config.hidden_size, config.index_head_dim)
    if dtype == torch.bfloat16 and any(dim % 2 for dim in pairs):
        return "a dimension that is odd"
    if not config.qk_rope_head_dim <= min(MAX_ROPE_DIM, config.index_head_dim):
        return f"a rotary dimension of {config.qk_rope_head_dim}"
    return None


class NativeParts:
    """Makes the layers of a model and the products between them, which compute one after another on threads of their
    own. Satisfies `glm_layer.Parts`."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype, num_threads: int) -> None:
        native_glm.declare(library)
        self._library, self._is_bf16 = library, int(dtype == torch.bfloat16)
        self._team = native.Team(library, num_threads)
        self._placed: Placed | None = None
        self._step, self._kept = native_glm.GlmStep(), list[torch.Tensor]()

    def layer(self, weights: GlmWeights, layer: int, group: Group) -> "NativeGlmLayer":
        """The layer of this number."""
        return NativeGlmLayer(self, weights, layer, group)

    def linear(self, weight: torch.Tensor) -> "NativeLinear":
        """A product with weight [N, K]."""
        return NativeLinear(self, weight)

    def step(self, turns: torch.Tensor, placed: Placed, top_k: int) -> native_glm.GlmStep:
        """What is the same in all layers of a step, made by the first one."""
        if placed is not self._placed:
            parts = native_indexer.longer(placed, top_k)
            pages, offsets = placed.own
            places = (placed.positions, placed.first_pages, placed.page_ids, pages, offsets, torch.tensor(parts))
            self._kept = [each.contiguous() for each in (*places, turns)]
            addresses = (each.data_ptr() for each in self._kept)
            self._step = native_glm.GlmStep(len(placed.positions), len(parts), *addresses)
            self._placed = placed
        return self._step

    def compute(self, layer: native_glm.GlmLayer, x: torch.Tensor, parts: int) -> torch.Tensor:
        """What a layer of the step makes of x [T, hidden], a tensor like it."""
        step, x, out = self._step, x.contiguous(), torch.empty_like(x)
        step.x, step.out = x.data_ptr(), out.data_ptr()
        which = ctypes.byref(layer), ctypes.byref(step)
        team = self._team.handle
        step.workspace = self._team.workspace(self._library.forebay_glm_workspace_bytes(*which, team, self._is_bf16))
        self._library.forebay_glm_layer(*which, team, self._is_bf16, parts)
        return out

    def multiply(self, x: torch.Tensor, weight: native.Linear) -> torch.Tensor:
        """x [T, K] with a packed matrix: float32 [T, N or more]."""
        x, out = x.contiguous(), torch.empty(len(x), weight.num_panels * native.PANEL)
        where = self._team.handle, self._is_bf16, x.data_ptr(), len(x), out.data_ptr()
        self._library.forebay_product(ctypes.byref(weight), *where)
        return out


class NativeLinear:
    """As `layers.linear.Linear` without a bias, for rows of whole words; the result is float32."""

    def __init__(self, parts: NativeParts, weight: torch.Tensor) -> None:
        self._parts, self._arena, self._num_columns = parts, native.Arena(), len(weight)
        self._weight = self._arena.linear(weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The product, float32 [T, N]."""
        return self._parts.multiply(x, self._weight)[:, : self._num_columns]


class NativeGlmLayer:
    """As `layers.glm_layer.GlmLayer`, with an indexer of its own and without products in FP4."""

    def __init__(self, parts: NativeParts, weights: GlmWeights, layer: int, group: Group) -> None:
        self._parts, self._group, self._arena = parts, group, native.Arena()
        self._top_k = weights.config.index_topk
        self._layer = self._attention(weights, layer)
        self._selects = self._layer.index_heads > 0
        mlp = weights.mlp(layer)
        own = mlp.shared if isinstance(mlp, MoeWeights) else mlp
        self._layer.inner = _even(own.down.shape[1])
        self._layer.gate_up = self._arena.linear(native.interleave(own.gate_up))
        self._layer.down = self._arena.linear(own.down)
        if isinstance(mlp, MoeWeights):
            self._mix(weights.config, mlp)

    def __call__(
        self,
        x: torch.Tensor,
        turns: torch.Tensor,
        step: Placed,
        latents: Rows,
        index_keys: Rows | None,
        selection: Selection,
    ) -> tuple[torch.Tensor, Selection]:
        """As of GlmLayer; `latents` and `index_keys` are FloatRows of the dtype of x."""
        own = self._parts.step(turns, step, self._top_k)
        own.keys = native.IndexKeys()
        if self._selects and index_keys is not None:
            own.keys = native_indexer.placed(index_keys)
            selection = torch.empty(len(x), min(self._top_k, max(step.contexts)), dtype=torch.int64)
        selection = selection.contiguous()
        own.latents, own.selection, own.num_selected = _placed(latents), selection.data_ptr(), selection.shape[1]
        if self._group.num_ranks == 1:
            return self._parts.compute(self._layer, x, ATTENTION | MLP), selection
        x = x + self._group.sum(self._parts.compute(self._layer, x, ATTENTION))
        return x + self._group.sum(self._parts.compute(self._layer, x, MLP)), selection

    def _attention(self, of: GlmWeights, layer: int) -> native_glm.GlmLayer:
        """A layer that has no MLP yet."""
        config, arena = of.config, self._arena
        weights, (input_norm, post_norm) = of.attention(layer), of.norms(layer)
        indexer, low, query = weights.indexer, [weights.down], [weights.query]
        key_norm: tuple[torch.Tensor | None, ...] = (None, None)
        if indexer is not None:
            low, query, key_norm = [*low, indexer.key, indexer.head_weights], [*query, indexer.query], indexer.key_norm
        norms = (input_norm, weights.query_norm, weights.latent_norm, *key_norm, post_norm)
        return native_glm.GlmLayer(
            *(config.hidden_size, config.num_heads, config.q_lora_rank, config.kv_lora_rank),
            *(config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim),
            *((config.index_num_heads, config.index_head_dim) if indexer else (0, 0)),
            *(0, 0, 0, 0),
            *(config.rms_norm_eps, config.latent_norm_eps, KEY_NORM_EPS),
            *(arena.vector(norm) for norm in norms),
            arena.linear(torch.cat(low)),
            arena.linear(torch.cat(query)),
            arena.linears(matrix.t() for matrix in weights.up_key),
            arena.linears(weights.up_value),
            arena.linear(weights.output),
        )

    def _mix(self, config: GlmConfig, mlp: MoeWeights) -> None:
        layer, arena, experts = self._layer, self._arena, mlp.experts
        layer.expert_inner, layer.first_expert = _even(experts.down.shape[2]), mlp.expert_ids.start
        layer.num_own = len(mlp.expert_ids)
        layer.router = arena.linear(mlp.router.float())
        layer.expert_gate_up = arena.linears(native.interleave(each) for each in experts.gate_up)
        layer.expert_down = arena.linears(experts.down)
        layer.routing = native_glm.Routing(
            *(config.num_experts, config.num_experts_per_token, config.num_groups, config.num_chosen_groups),
            *(config.normalize_top_k, config.routed_scaling_factor, arena.address(mlp.correction_bias.float())),
        )


def _even(dim: int) -> int:
    """A row of so many elements as whole words: what is behind it multiplies zeros."""
    return dim + dim % 2


def _placed(latents: Rows) -> native_glm.PagedRows:
    """Where they are."""
    assert isinstance(latents, FloatRows), "others are an obstacle"
    page_bytes, row_bytes = (stride * latents.state.itemsize for stride in latents.state.stride()[:2])
    return native_glm.PagedRows(latents.state.data_ptr(), page_bytes, latents.page_size, row_bytes)
