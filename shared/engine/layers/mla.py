"""Multi-head latent attention with a sparse selection that layers may share."""

import torch
import torch.nn.functional as F

from shared.engine.kernels import reference, sparse_reference
from shared.engine.kernels.sparse_reference import Placed, Rows, Select, Selection
from shared.engine.layers.linear import Linear, RowLinear
from shared.engine.models.glm_config import GlmConfig
from shared.engine.models.glm_weights import AttentionWeights, IndexerWeights
from shared.engine.parallel.group import Group

KEY_NORM_EPS = 1e-6


class LatentAttention:
    """x [T, hidden] -> [T, hidden], in the absorbed form (DeepSeek-V2, section 2.1.2): keys and values are never made.

    Ranks share out the heads; each keeps all latents and index keys, and so comes to the same selection.
    A layer with an indexer selects; one without uses the selection it is given, of the nearest earlier layer.
    """

    def __init__(self, config: GlmConfig, weights: AttentionWeights, group: Group, select: Select) -> None:
        self.config = config
        self.parts = [config.q_lora_rank, config.kv_lora_rank, config.qk_rope_head_dim]
        self.down, self.query = Linear(weights.down), Linear(weights.query)
        self.query_norm, self.latent_norm = weights.query_norm, weights.latent_norm
        self.up_key, self.up_value = weights.up_key, weights.up_value
        self.output = RowLinear(weights.output, None, group)
        self.indexer = None if weights.indexer is None else Indexer(config, weights.indexer, select)

    def __call__(
        self,
        x: torch.Tensor,
        turns: torch.Tensor,
        step: Placed,
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
        key_rope = sparse_reference.rotate_interleaved(key_rope[:, None], turns)[:, 0]
        latents.write(*step.own, torch.cat((latent, key_rope), dim=1))
        if self.indexer is not None and index_keys is not None:
            selection = self.indexer(x, q_low, turns, step, index_keys)
        scale = config.qk_head_dim**-0.5
        q = self._absorbed_query(q_low, turns)
        attended = sparse_reference.sparse_attention(q, latents, selection, step, config.kv_lora_rank, scale)
        values = torch.bmm(attended.transpose(0, 1), self.up_value.transpose(1, 2)).transpose(0, 1)
        return self.output(values.flatten(1)), selection

    def _absorbed_query(self, q_low: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """[T, H, latent_dim]: the part without position taken into latent space, the rotary part as it is."""
        config = self.config
        q = self.query(q_low).view(-1, config.num_heads, config.qk_head_dim)
        q_nope, q_rope = q.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        absorbed = torch.bmm(q_nope.transpose(0, 1), self.up_key).transpose(0, 1)
        return torch.cat((absorbed, sparse_reference.rotate_interleaved(q_rope, turns)), dim=-1)


class Indexer:
    """Chooses the tokens that a layer, and those that share with it, attend to (DSA). `select` is the kernel."""

    def __init__(self, config: GlmConfig, weights: IndexerWeights, select: Select) -> None:
        self.num_heads, self.head_dim = config.index_num_heads, config.index_head_dim
        self.rope_dim, self.top_k = config.qk_rope_head_dim, config.index_topk
        self.query, self.key = Linear(weights.query), Linear(weights.key)
        self.key_norm_weight, self.key_norm_bias = (part.float() for part in weights.key_norm)
        self.head_weights = Linear(weights.head_weights)
        self.select = select

    def __call__(
        self, x: torch.Tensor, q_low: torch.Tensor, turns: torch.Tensor, step: Placed, keys: Rows
    ) -> Selection:
        """Select for each token of the step, after writing its index key. x [T, hidden], q_low [T, q_lora]."""
        key = self.key(x).float()
        key = F.layer_norm(key, (self.head_dim,), self.key_norm_weight, self.key_norm_bias, KEY_NORM_EPS).to(x.dtype)
        keys.write(*step.own, self._rotate(key[:, None], turns)[:, 0])
        q = self._rotate(self.query(q_low).view(-1, self.num_heads, self.head_dim), turns)
        head_weights = self.head_weights(x).float() * self.num_heads**-0.5
        return self.select(q, head_weights, keys, step, self.top_k)

    def _rotate(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Only the first dimensions carry position. x [T, H, D]."""
        rotated = sparse_reference.rotate_interleaved(x[..., : self.rope_dim], turns)
        return torch.cat((rotated, x[..., self.rope_dim :]), dim=-1)
