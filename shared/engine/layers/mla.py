"""Multi-head latent attention with a sparse selection that layers may share."""

import torch
import torch.nn.functional as F

from shared.engine.batch import Batch
from shared.engine.kernels import reference, sparse_reference
from shared.engine.kernels.sparse_reference import Rows, Selection
from shared.engine.layers.linear import Linear, RowLinear
from shared.engine.models.glm_config import GlmConfig
from shared.engine.models.glm_weights import AttentionWeights, IndexerWeights
from shared.engine.parallel.group import Group

Rope = tuple[torch.Tensor, torch.Tensor]
KEY_NORM_EPS = 1e-6


class LatentAttention:
    """x [T, hidden] -> [T, hidden], in the absorbed form (DeepSeek-V2, section 2.1.2): keys and values are never made.

    Ranks share out the heads; each keeps all latents and index keys, and so comes to the same selection.
    A layer with an indexer selects; one without uses the selection it is given, of the nearest earlier layer.
    """

    def __init__(self, config: GlmConfig, weights: AttentionWeights, group: Group) -> None:
        self.config = config
        self.parts = [config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim]
        self.down, self.query = Linear(weights.down), Linear(weights.query)
        self.query_norm, self.latent_norm = weights.query_norm, weights.latent_norm
        self.up_key, self.up_value = weights.up_key, weights.up_value
        self.output = RowLinear(weights.output, None, group)
        self.indexer = None if weights.indexer is None else Indexer(config, weights.indexer)

    def __call__(
        self,
        x: torch.Tensor,
        angles: Rope,
        batch: Batch,
        latents: Rows,
        index_keys: Rows | None,
        selection: Selection,
    ) -> tuple[torch.Tensor, Selection]:
        """Attend; also return the selection, for the layers that share it.

        `latents` (rows of latent_dim) and `index_keys` (None in a sharing layer) are this layer's.
        """
        config = self.config
        q_low, latent, key_rope = self.down(x).split(self.parts, dim=1)
        q_low = reference.rms_norm(q_low, self.query_norm, config.latent_norm_eps)
        latent = reference.rms_norm(latent, self.latent_norm, config.latent_norm_eps)
        key_rope = sparse_reference.rotate_interleaved(key_rope[:, None], *angles)[:, 0]
        sparse_reference.append_state(latents, torch.cat((latent, key_rope), dim=1), batch)
        if self.indexer is not None and index_keys is not None:
            selection = self.indexer(x, q_low, angles, batch, index_keys)
        scale = config.qk_head_dim**-0.5
        q = self._absorbed_query(q_low, angles)
        attended = sparse_reference.sparse_attention(q, latents, selection, batch, config.kv_lora_rank, scale)
        return self.output(torch.einsum("thc,hvc->thv", attended, self.up_value).flatten(1)), selection

    def _absorbed_query(self, q_low: torch.Tensor, angles: Rope) -> torch.Tensor:
        """[T, H, latent_dim]: the part without position taken into latent space, the rotary part as it is."""
        config = self.config
        q = self.query(q_low).view(-1, config.num_heads, config.qk_head_dim)
        q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        absorbed = torch.einsum("thn,hnc->thc", q_nope, self.up_key)
        return torch.cat((absorbed, sparse_reference.rotate_interleaved(q_rope, *angles)), dim=-1)


class Indexer:
    """Chooses the tokens that a layer, and those that share with it, attend to (DSA)."""

    def __init__(self, config: GlmConfig, weights: IndexerWeights) -> None:
        self.num_heads, self.head_dim = config.index_num_heads, config.index_head_dim
        self.rope_dim, self.top_k = config.qk_rope_head_dim, config.index_topk
        self.query, self.key = Linear(weights.query), Linear(weights.key)
        self.key_norm_weight, self.key_norm_bias = (part.float() for part in weights.key_norm)
        self.head_weights = Linear(weights.head_weights)

    def __call__(self, x: torch.Tensor, q_low: torch.Tensor, angles: Rope, batch: Batch, keys: Rows) -> Selection:
        """Select for each token of the step, after writing its index key. x [T, hidden], q_low [T, q_lora]."""
        key = self.key(x).float()
        key = F.layer_norm(key, (self.head_dim,), self.key_norm_weight, self.key_norm_bias, KEY_NORM_EPS).to(x.dtype)
        sparse_reference.append_state(keys, self._rotate(key[:, None], angles)[:, 0], batch)
        q = self._rotate(self.query(q_low).view(-1, self.num_heads, self.head_dim), angles)
        head_weights = self.head_weights(x).float() * self.num_heads**-0.5
        return sparse_reference.select(q, head_weights, keys, batch, self.top_k)

    def _rotate(self, x: torch.Tensor, angles: Rope) -> torch.Tensor:
        """Only the first dimensions carry position. x [T, H, D]."""
        rotated = sparse_reference.rotate_interleaved(x[..., : self.rope_dim], *angles)
        return torch.cat((rotated, x[..., self.rope_dim :]), dim=-1)
