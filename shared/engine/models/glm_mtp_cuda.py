"""The MTP layer of GLM-5, 5.1 and 5.2 on a GPU. What it computes is said in `glm_mtp`, which is its twin.

What joins the layer to the model is a product of two norms beside each other, of which a rank computes its columns.
Steps of few rows are graphs, and what one leaves for the next stays on the device, so a sequence's drafts
follow each other without the host, which launches them ahead.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from shared.engine.batch import Batch
from shared.engine.kernels import triton_begin, triton_dense, triton_index, w8a16
from shared.engine.kernels.cuda_fp8 import Fp8Matrix
from shared.engine.kernels.inputs import Selected
from shared.engine.kv import view
from shared.engine.kv.layout import KvLayout
from shared.engine.layers import cuda_glm, cuda_glm_layer, cuda_glm_weights
from shared.engine.layers.captured import lent
from shared.engine.layers.cuda_glm import GRAPH_SIZES, MAX_GRAPH_PAGES, CudaGlm
from shared.engine.layers.cuda_glm_layer import State, Step
from shared.engine.layers.cuda_glm_weights import Layer, Matrix
from shared.engine.models.api import DraftStep
from shared.engine.models.glm_layout import INDEX_KEYS, LATENTS, MTP_INDEX_KEYS, MTP_LATENTS
from shared.engine.models.glm_weights import MtpWeights
from shared.engine.parallel.group import Group
from shared.engine.pinned import put

GRAPH_ROWS = (*range(1, 9), 12, 16, 24, 32, 48, 64, 96, 128)
NUM_DRAFTING = (0, *GRAPH_SIZES)
QUANTIZED_ROWS = 4096  # at a time, whole blocks: what it takes on the way is several times as large


@dataclass(frozen=True, slots=True)
class Given:
    """What a step takes, on the device: rows as `cuda_glm.Graph` has its inputs, the model's states (or those of the
    drafts before) [T, hidden], which rows draft, int64 [S], and a selection to keep, or None to select."""

    rows: torch.Tensor
    states: torch.Tensor
    drafting: torch.Tensor
    selected: Selected | None


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured step."""

    graph: torch.cuda.CUDAGraph
    given: Given
    found: DraftStep


class GlmMtpOnCuda:
    """Satisfies `models.api.DraftLayer`. What it carries from draft to draft are the selections of the sequences: slots
    int32 [S, top_k] and counts int32 [S]. What a step returns is there until the next one, of this layer or of the
    model's. `join` is what the rank has of the product that joins the layer to the model, `head` what it chooses by."""

    def __init__(self, decoder: CudaGlm, layer: Layer, own: MtpWeights) -> None:
        self._decoder, self._layer = decoder, layer
        self._sharing = replace(layer, attention=cuda_glm_weights.sharing(layer.attention, decoder.config))
        self._embedding_norm, self._state_norm, self._output_norm = own.embedding_norm, own.state_norm, own.output_norm
        self.join, self.head = own_rows(own.join, decoder.group), draft_head(decoder.ends.head, layer)
        self._graphs: dict[tuple[int, int, bool, int], Graph] = {}
        self._states: tuple[torch.Tensor, tuple[State, State]] | None = None  # of the pool that was there last

    def forward(self, batch: Batch, pool: torch.Tensor, layout: KvLayout) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the sampled rows, and the model's states [T, hidden] behind its last norm."""
        logits, states = self._decoder(batch, pool, layout, (LATENTS, INDEX_KEYS))
        return self._joined(logits), states

    def extend(self, batch: Batch, states: torch.Tensor, pool: torch.Tensor, layout: KvLayout) -> DraftStep:
        """Follow the model; see `models.api.DraftLayer`."""
        return self._step(batch, states, None, pool, layout)

    def advance(
        self, batch: Batch, last: DraftStep, going_on: Sequence[int], pool: torch.Tensor, layout: KvLayout
    ) -> DraftStep:
        """Go on alone; see `models.api.DraftLayer`."""
        slots, counts = last.carried
        states = last.states
        if list(going_on) != list(range(len(states))):
            rows = put(going_on, torch.int64, states.device)
            states, slots, counts = states[rows], slots[rows], counts[rows]
        kept = Selected(slots, counts) if self._decoder.config.share_mtp_selection else None
        return self._step(batch, states, kept, pool, layout)

    def _step(
        self, batch: Batch, states: torch.Tensor, kept: Selected | None, pool: torch.Tensor, layout: KvLayout
    ) -> DraftStep:
        num_drafting, most = len(batch.sampled_rows), int(batch.context_lens.max())
        if self._states is None or self._states[0] is not pool:
            self._states = pool, self._views(pool, layout)
        state = self._states[1][kept is None]
        fits = batch.num_tokens <= GRAPH_ROWS[-1] and num_drafting <= NUM_DRAFTING[-1]
        if not fits or len(batch.page_ids) >= MAX_GRAPH_PAGES:
            rows = cuda_glm.on_device(batch, layout.page_size, states.device)
            drafting = put(batch.sampled_rows, torch.int64, states.device)
            return self._compute(Given(rows, states, drafting, kept), state, most)
        graph = self._graph(batch.num_tokens, num_drafting, most, state, kept is not None)
        given = graph.given
        copied = [(states, given.states[: batch.num_tokens])]
        if given.selected is not None and kept is not None:
            copied.append((kept.slots, given.selected.slots[: batch.num_tokens]))
            copied.append((kept.counts, given.selected.counts[: batch.num_tokens]))
        elif num_drafting:
            drafting = put(batch.sampled_rows, torch.int64, states.device)
            copied.append((drafting, given.drafting[:num_drafting]))
        cuda_glm.stage(batch, len(given.states), layout.page_size, given.rows, copied)
        graph.graph.replay()
        logits, m, carried = graph.found.logits, graph.found.states, graph.found.carried
        own = [part[:num_drafting] for part in carried]
        return DraftStep(logits[:num_drafting], m[:num_drafting], own)

    def _graph(self, num_rows: int, num_drafting: int, context: int, state: State, shared: bool) -> Graph:
        num_rows = GRAPH_ROWS[bisect_left(GRAPH_ROWS, num_rows)]
        num_drafting = num_rows if shared else NUM_DRAFTING[bisect_left(NUM_DRAFTING, num_drafting)]
        key = num_rows, num_drafting, shared, cuda_glm.room(context)
        if key not in self._graphs:
            decoder, device = self._decoder, self._decoder.device
            given = Given(
                cuda_glm.nobodys(num_rows, device),
                torch.zeros(num_rows, decoder.config.hidden_size, dtype=torch.bfloat16, device=device),
                torch.zeros(num_drafting, dtype=torch.int64, device=device),
                self._nothing(num_rows) if shared else None,
            )
            num_pages, page_size = state.latents.shape[:2]
            capacity = min(key[-1], num_pages * page_size)
            graph, found = decoder.recorder.record(lambda: self._compute(given, state, capacity))
            left = DraftStep(lent(found.logits), lent(found.states), [lent(part) for part in found.carried])
            self._graphs[key] = Graph(graph, given, left)
        return self._graphs[key]

    def _nothing(self, num_rows: int) -> Selected:
        """A selection that any row may attend to: one token."""
        selected = triton_index.empty(num_rows, self._decoder.config.index_topk, self._decoder.device)
        selected.slots.zero_()
        selected.counts.fill_(1)
        return selected

    def _compute(self, given: Given, state: State, capacity: int) -> DraftStep:
        """Logits of the rows that draft, their m and their selections."""
        decoder, num_rows, kept = self._decoder, len(given.states), given.selected
        config = decoder.config
        embedded, rows = cuda_glm.begun(given.rows, num_rows, decoder.ends, decoder.frequencies, decoder.group)
        selected = kept or triton_index.empty(len(given.drafting), config.index_topk, decoder.device)
        step = Step(config, decoder.group, rows, selected, capacity, decoder.pdl, decoder.latent)
        gains = self._embedding_norm, self._state_norm
        both = triton_begin.norms(embedded, given.states, gains, config.rms_norm_eps)
        x = cuda_glm_layer.plain(both, self.join, pdl=decoder.pdl)
        if len(self.join) < config.hidden_size:
            x = decoder.group.join(x)
        layer = self._layer if kept is None else self._sharing
        # Whoever drafts no further is followed for its state alone.
        x, delta = cuda_glm_layer.forward(x, None, layer, state, step, given.drafting if kept is None else None)
        m = triton_dense.add_rms_norm(x, delta, self._output_norm, config.rms_norm_eps) if len(x) else x
        carried = [selected.slots, selected.counts]
        return DraftStep(self._joined(cuda_glm_layer.logits(m, self.head, pdl=decoder.pdl)), m, carried)

    def _views(self, pool: torch.Tensor, layout: KvLayout) -> tuple[State, State]:
        """The layer's state where it keeps a selection, and where it selects."""
        config = self._decoder.config
        sizes = ((MTP_LATENTS, config.latent_dim), (MTP_INDEX_KEYS, config.index_head_dim))
        latents, keys = (
            view.state_view(pool, view.state_class(layout, name), (layout.page_size, size)) for name, size in sizes
        )
        return State(latents, None, False), State(latents, keys, True)

    def _joined(self, logits: torch.Tensor) -> torch.Tensor:
        return self._decoder.group.join(logits) if len(logits) else logits


def own_rows(join: torch.Tensor, group: Group) -> torch.Tensor:
    """A rank's share of what joins the layer to the model, or all of it if it cannot be shared out."""
    if group.num_ranks == 1 or len(join) % group.num_ranks:
        return join
    return join.chunk(group.num_ranks)[group.rank].clone()


def draft_head(head: torch.Tensor, layer: Layer) -> Matrix:
    """What drafts are chosen by: the model's head, in e4m3 if the layer's own matrices are. A draft is a guess, which
    the model's own head verifies."""
    output = layer.attention.output
    if not isinstance(output, Fp8Matrix) or not w8a16.fits(*head.shape):
        return head
    parts = [w8a16.of_blocks(*w8a16.quantize(rows)) for rows in head.split(QUANTIZED_ROWS)]
    return Fp8Matrix(w8a16.join(parts), output.kernels)
