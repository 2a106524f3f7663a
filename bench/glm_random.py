"""A rank of GLM-5.2 at its full size, with random weights made on the device."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch

from shared.engine.kernels import build, w8a16
from shared.engine.kernels.cuda_experts import CudaExperts
from shared.engine.kernels.cuda_few import CudaFew
from shared.engine.kernels.cuda_fp8 import CudaFp8, Fp8Matrix
from shared.engine.kernels.cuda_latent import CudaLatent
from shared.engine.kernels.experts import FACTOR, Experts, SharedExpert
from shared.engine.kernels.inputs import KeyNorm
from shared.engine.kv.layout import KvLayout
from shared.engine.kv.view import DeviceMemory
from shared.engine.layers import cuda_glm_weights
from shared.engine.layers.cuda_glm import CudaGlm, Ends
from shared.engine.layers.cuda_glm_weights import Attention, Dense, Layer, Matrix, Mixture
from shared.engine.models import glm_layout
from shared.engine.models.glm_config import GlmConfig
from shared.engine.models.glm_cuda import kernels_of
from shared.engine.models.glm_mtp_cuda import GlmMtpOnCuda
from shared.engine.models.glm_weights import MtpWeights
from shared.engine.parallel.group import Group, added
from shared.engine.parallel.partition import Shard, of_glm
from shared.models.store import default_cache

FIELDS = {
    "vocab_size": 154_880,
    "hidden_size": 6144,
    "intermediate_size": 12_288,
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "index_share_for_mtp_iteration": True,
    "num_attention_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_theta": 8e6},
    "max_position_embeddings": 1_048_576,
    "eos_token_id": [154_820],
}
PAGE_SIZE = 64
NAMES = glm_layout.LATENTS, glm_layout.INDEX_KEYS
KV_TOKENS = 135_000
OfRanks = TypeVar("OfRanks", bound=Group)


class Counted:
    """A group whose collectives do nothing but count."""

    def __init__(self, num_ranks: int) -> None:
        self.rank, self.num_ranks = 0, num_ranks
        self.num_sums = self.num_bytes = 0
        self.parts: list[torch.Tensor] | None = None

    def sum(self, part: torch.Tensor) -> torch.Tensor:
        """The part."""
        self.num_sums += 1
        self.num_bytes += part.nbytes
        if self.parts is not None:
            self.parts.append(part.clone())  # it may be added to
        return part

    def add(self, part: torch.Tensor, stream: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As if it were the sum."""
        return added(self.sum(part), stream, gain)

    def join(self, part: torch.Tensor) -> torch.Tensor:
        """As if all ranks had the same part."""
        return part.repeat(*[1] * (part.dim() - 1), self.num_ranks)


class RandomLayers:
    """A rank's weights, made on the device, alike on all ranks. With `fp8`, linears that GLM's FP8 checkpoints have in
    e4m3 are kept so: attention's but kv_b, and those of dense MLPs."""

    def __init__(
        self, config: GlmConfig, num_ranks: int, device: torch.device, fp8: CudaFp8 | None = None, rank: int = 0
    ) -> None:
        shard = Shard(rank, num_ranks, "matrices")
        self.config, self._device, self._fp8 = of_glm(config, shard)[0], device, fp8
        self._inner = len(shard.share(config.moe_intermediate_size))
        self._chance = torch.Generator(device).manual_seed(0)
        self._tokens = shard.share(config.vocab_size)

    def ends(self) -> Ends:
        hidden, num_tokens = self.config.hidden_size, len(self._tokens)
        table = self._matrix(num_tokens, hidden)
        return Ends(table * hidden**0.5, self._tokens.start, self._gain(hidden), self._matrix(num_tokens, hidden))

    def layer(self, index: int) -> Layer:
        moe, hidden = self.config.moe_layers[index], self.config.hidden_size
        return Layer(
            self._gain(hidden),
            self._gain(hidden),
            self._attention(full=self.config.full_layers[index]),
            self._mixture() if moe else self._mlp(self.config.intermediate_size),
        )

    def drafting_layer(self) -> Layer:
        """As NVIDIA's checkpoint has it: its experts, too, are in bfloat16."""
        c, hidden, inner = self.config, self.config.hidden_size, self._inner
        gate_up = self._matrix(c.num_experts * 2 * inner, hidden).unflatten(0, (c.num_experts, -1))
        down = self._matrix(c.num_experts * hidden, inner).unflatten(0, (c.num_experts, -1))
        mlp = replace(self._mixture(), experts=Experts(gate_up, down))
        return Layer(self._gain(hidden), self._gain(hidden), self._attention(full=True), mlp)

    def joining(self) -> MtpWeights:
        hidden = self.config.hidden_size
        return MtpWeights(
            embedding_norm=self._gain(hidden),
            state_norm=self._gain(hidden),
            join=self._matrix(hidden, 2 * hidden),
            output_norm=self._gain(hidden),
        )

    def _attention(self, *, full: bool) -> Attention:
        c = self.config
        heads = c.index_num_heads  # whose weights are in bfloat16 everywhere
        index_rows = c.index_head_dim + heads if full else 0
        index_queries = c.index_num_heads * c.index_head_dim if full else 0
        ones = torch.ones(c.index_head_dim, device=self._device)
        return Attention(
            down=self._stored(c.q_lora_rank + c.latent_dim + index_rows, c.hidden_size, heads if full else 0),
            query_norm=self._gain(c.q_lora_rank),
            query=self._stored(c.num_heads * c.qk_head_dim + index_queries, c.q_lora_rank),
            latent_norm=self._gain(c.kv_lora_rank),
            up_key=self._matrix(c.num_heads * c.qk_nope_head_dim, c.kv_lora_rank).unflatten(0, (c.num_heads, -1)),
            up_value=self._matrix(c.num_heads * c.v_head_dim, c.kv_lora_rank).unflatten(0, (c.num_heads, -1)),
            output=self._stored(c.hidden_size, c.num_heads * c.v_head_dim),
            key_norm=KeyNorm(ones, 0 * ones, 1e-6) if full else None,
        )

    def _mlp(self, inner: int) -> Dense:
        hidden = self.config.hidden_size
        return Dense(self._stored(2 * inner, hidden), self._stored(hidden, inner))

    def _stored(self, rows: int, columns: int, num_others: int = 0) -> Matrix:
        """In e4m3 but for the last rows, if wanted."""
        matrix = self._matrix(rows, columns)
        if self._fp8 is None:
            return matrix
        codes, scales = w8a16.quantize(matrix[: rows - num_others])
        weight = w8a16.join([w8a16.of_blocks(codes, scales)], matrix[rows - num_others :])
        return Fp8Matrix(weight, self._fp8)

    def _mixture(self) -> Mixture:
        c, inner = self.config, self._inner
        bias = torch.randn(c.num_experts, generator=self._chance, device=self._device) * 0.02
        sizes = torch.tensor([c.hidden_size, inner], device=self._device)
        factors = (FACTOR / 3 * sizes**-0.5).expand(c.num_experts, 2).contiguous()  # codes are 2.9 in the mean square
        gate_up, gate_up_scale = self._packed(2 * inner, c.hidden_size)
        down, down_scale = self._packed(c.hidden_size, inner)
        experts = Experts(gate_up, down, gate_up_scale, down_scale, factors)
        shared = SharedExpert(self._matrix(2 * inner, c.hidden_size), self._matrix(c.hidden_size, inner))
        return Mixture(self._matrix(c.num_experts, c.hidden_size), bias, experts, shared)

    def _packed(self, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        num = self.config.num_experts
        return self._bytes(0, 256, num, rows, columns // 2), self._bytes(0x30, 0x40, num, rows, columns // 16)

    def _bytes(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self._chance, dtype=torch.uint8, device=self._device)

    def _matrix(self, rows: int, columns: int) -> torch.Tensor:
        values = torch.randn(rows, columns, generator=self._chance, dtype=torch.bfloat16, device=self._device)
        return values.mul_(float(columns) ** -0.5)

    def _gain(self, size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16, device=self._device)


@dataclass(frozen=True, slots=True)
class Rank(Generic[OfRanks]):
    """A rank, its pages filled with noise, the same for all ranks."""

    decoder: CudaGlm
    layers: Sequence[Layer]
    drafting_layer: Layer
    drafts: GlmMtpOnCuda
    memory: DeviceMemory
    layout: KvLayout
    group: OfRanks


def compiled(device: torch.device) -> tuple[CudaExperts, CudaLatent, CudaFp8, CudaFew]:
    """The kernels that nvcc makes."""
    capability = torch.cuda.get_device_capability(device)
    path = build.cuda_library(default_cache() / "kernels", build.cuda_compiler(), capability, "glm")
    return kernels_of(path, device)


def rank(
    config: GlmConfig, group: OfRanks, device: torch.device, *, pdl: bool, cuda: bool, fp8: bool = False,
    kv_tokens: int = KV_TOKENS,
) -> Rank[OfRanks]:  # fmt: skip
    """Make that of a group, with room for so many tokens; without `cuda` its kernels are those that need no compiler.
    `fp8` as in RandomLayers."""
    grouped, latent, products, few = compiled(device) if cuda or fp8 else (None, None, None, None)
    weights = RandomLayers(config, group.num_ranks, device, products if fp8 else None, group.rank)
    top_k = config.num_experts_per_token
    layers = [
        cuda_glm_weights.grouping(weights.layer(index), top_k, grouped, few) for index in range(config.num_layers)
    ]
    drafting_layer, joining = weights.drafting_layer(), weights.joining()
    layout = glm_layout.layout(config, "bfloat16", PAGE_SIZE, mtp=True)
    memory = DeviceMemory(kv_tokens // PAGE_SIZE, layout.page_bytes, device)
    chance = torch.Generator(device).manual_seed(1)
    for part in memory.bytes.view(torch.bfloat16).split(256):
        part.normal_(generator=chance)
    decoder = CudaGlm(weights.config, weights.ends(), layers, group, latent, pdl=pdl)
    drafts = GlmMtpOnCuda(decoder, drafting_layer, joining)
    return Rank(decoder, layers, drafting_layer, drafts, memory, layout, group)
