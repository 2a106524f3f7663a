"""The MTP layer of GLM-5, 5.1 and 5.2: proposes what comes after the token behind a position.

    u[i] = join( norm(embedding of token i + 1) , norm(state i) )        state i: the model's, behind its last norm
    m[i] = norm(layer(u)[i]),  logits of token i + 2 = head(m[i])        embedding and head are the model's

The layer's own state at position i therefore belongs to the tokens up to i + 1. A draft goes in with m in place of the
state. GLM-5.2 was trained to keep the selection of the last token before the drafts: they attend to nothing that a
draft wrote. GLM-5 and 5.1 select anew for each draft, among what the drafts before it wrote too.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from shared.engine.batch import Batch
from shared.engine.kernels import reference
from shared.engine.kernels.sparse_reference import Placed, Selection
from shared.engine.kv.layout import KvLayout
from shared.engine.layers import rope
from shared.engine.layers.glm_layer import Parts
from shared.engine.layers.vocabulary import Embedding, Head
from shared.engine.models.api import DraftStep
from shared.engine.models.glm_layout import MTP_INDEX_KEYS, MTP_LATENTS
from shared.engine.models.glm_weights import GlmWeights
from shared.engine.parallel.group import Group
from shared.engine.quantization import rows


class Trunk(Protocol):
    """The model that the layer belongs to."""

    embedding: Embedding
    head: Head
    frequencies: torch.Tensor

    def hidden(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> torch.Tensor:
        """What the last layer leaves, [T, hidden]."""

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's last norm."""


class GlmMtp:
    """Satisfies `models.api.DraftLayer`. What it carries from draft to draft are selections."""

    def __init__(self, weights: GlmWeights, group: Group, trunk: Trunk, parts: Parts) -> None:
        self._config, self._trunk, own = weights.config, trunk, weights.mtp()
        self._layer = parts.layer(weights, weights.config.num_layers, group)
        self._embedding_norm, self._state_norm, self._output_norm = own.embedding_norm, own.state_norm, own.output_norm
        self._join = parts.linear(own.join)

    def forward(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the sampled rows, and the model's states [T, hidden] behind its last norm."""
        states = self._trunk.norm(self._trunk.hidden(batch, pool, layout))
        return self._trunk.head(states[batch.sampled_rows]), states

    def extend(self, batch: Batch, states: torch.Tensor, pool: torch.Tensor, layout: KvLayout) -> DraftStep:
        """Follow the model; see `models.api.DraftLayer`."""
        m, selection = self._run(batch, states, pool, layout, None)
        return self._step(m[batch.sampled_rows], selection[batch.sampled_rows])

    def advance(
        self, batch: Batch, last: DraftStep, going_on: Sequence[int], pool: torch.Tensor, layout: KvLayout
    ) -> DraftStep:
        """Go on alone; see `models.api.DraftLayer`."""
        rows, (carried,) = list(going_on), last.carried
        kept = carried[rows]
        shared = kept if self._config.share_mtp_selection else None
        m, _ = self._run(batch, last.states[rows], pool, layout, shared)
        return self._step(m, kept)

    def _run(
        self, batch: Batch, states: torch.Tensor, pool: torch.Tensor, layout: KvLayout, shared: Selection | None
    ) -> tuple[torch.Tensor, Selection]:
        """m [T, hidden] and the selection, which is `shared` unless that is None."""
        config, norm = self._config, reference.rms_norm
        embedded = norm(self._trunk.embedding(batch.token_ids), self._embedding_norm, config.rms_norm_eps)
        normed = norm(states, self._state_norm, config.rms_norm_eps)
        u = self._join(torch.cat((embedded, normed), dim=1)).to(normed.dtype)
        latents = rows.latents(pool, layout, MTP_LATENTS, config.kv_lora_rank)[0]
        keys = rows.index_keys(pool, layout, MTP_INDEX_KEYS, config.index_head_dim)[0] if shared is None else None
        turns, step = rope.turns(self._trunk.frequencies, batch.positions), Placed.of(batch, layout.page_size)
        selection = step.positions[:, None] if shared is None else shared
        z, selection = self._layer(u, turns, step, latents, keys, selection)
        return norm(z, self._output_norm, config.rms_norm_eps), selection

    def _step(self, m: torch.Tensor, kept: Selection) -> DraftStep:
        return DraftStep(self._trunk.head(m), m, [kept])
