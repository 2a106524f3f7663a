"""A GLM-5 decoder on a GPU: steps of few tokens as CUDA graphs, others launched kernel by kernel.

A step whose sequences all compute equally many tokens (decode: one; verification of drafts: one more than there are
drafts) is replayed as a graph, padded to the next size. Where a row's context ends is data: a graph fits every context
that it has room for, and there are few such rooms, so that short contexts do not pay for long ones.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from shared.engine.api import Recorded
from shared.engine.batch import Batch
from shared.engine.kernels import triton_begin, triton_dense, triton_index, triton_moved, triton_prompt
from shared.engine.kernels.cuda_latent import CudaLatent
from shared.engine.kernels.inputs import Rows, Span
from shared.engine.kv import view
from shared.engine.kv.layout import KvLayout
from shared.engine.layers import captured, cuda_glm_layer, rope
from shared.engine.layers.cuda_glm_layer import State, Step
from shared.engine.layers.cuda_glm_weights import Layer
from shared.engine.models.glm_config import GlmConfig
from shared.engine.parallel.group import Group
from shared.engine.pinned import put

GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MAX_GRAPH_WIDTH = 8
MAX_GRAPH_PAGES = 1 << 17
LEAST_ROOM, MORE_ROOM = 2048, 4  # tokens of a context; and times more
NOBODY = -1
LEAST_TOGETHER = 64  # rows of one sequence


@dataclass(frozen=True, slots=True)
class Ends:
    """Both ends of a rank's decoder: rows `first_token` on of the embedding, and the norm and rows of the head."""

    embedding: torch.Tensor
    first_token: int
    norm: torch.Tensor
    head: torch.Tensor


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured step. Its inputs lie one behind the other in `inputs`: token ids, positions, slots and places of page
    tables of T rows; page ids, and room for T numbers. What it leaves is there until the next graph is replayed."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    states: torch.Tensor
    logits: torch.Tensor  # float32


class CudaGlm:
    """Computes batches in host memory with weights and pages on the GPU."""

    def __init__(
        self,
        config: GlmConfig,
        ends: Ends,
        layers: Sequence[Layer],
        group: Group,
        latent: CudaLatent | None = None,
        *,
        pdl: bool = True,
    ) -> None:
        """`latent` and `pdl` as in `cuda_glm_layer.Step`."""
        self.config, self.ends, self.group = config, ends, group
        self.device, self.latent, self.pdl = ends.norm.device, latent, pdl
        self.frequencies = rope.frequencies(config.qk_rope_head_dim, config.rope_theta).to(self.device)
        self._layers = layers
        self._graphs: dict[tuple[int, int, int], Graph] = {}
        self.recorder = captured.Recorder(self.device)
        self._views: tuple[torch.Tensor, list[State]] | None = None  # of the pool that was there last

    def __call__(self, batch: Batch, pool: torch.Tensor, layout: KvLayout, names: tuple[str, str]) -> tuple[
        torch.Tensor, torch.Tensor
    ]:  # fmt: skip
        """This rank's logits of the sampled rows, float32 [R, V / ranks], and all states behind the last norm. Both are
        there until the next graph is replayed, of this decoder or of what shares its recorder."""
        width, rest = divmod(batch.num_tokens, batch.num_sequences)
        uniform = not rest and bool((batch.query_starts.diff() == width).all())
        fits = batch.num_sequences <= GRAPH_SIZES[-1] and len(batch.page_ids) < MAX_GRAPH_PAGES
        if self._views is None or self._views[0] is not pool:
            self._views = pool, views(pool, layout, self.config, names)
        states = self._views[1]
        if uniform and fits and width <= MAX_GRAPH_WIDTH:
            graph = self._replay(batch, width, states, layout.page_size)
            return _sampled(graph.logits[: batch.num_tokens], batch), graph.states[: batch.num_tokens]
        found = self.launch(batch, states, layout.page_size)
        return cuda_glm_layer.logits(_sampled(found, batch), self.ends.head, pdl=self.pdl), found

    def launch(self, batch: Batch, states: Sequence[State], page_size: int) -> torch.Tensor:
        """The last norm's output [T, hidden], kernel by kernel."""
        inputs = on_device(batch, page_size, self.device)
        together = spans(batch, inputs[4 * batch.num_tokens :], len(states[0].latents), self.config)
        return self._hidden(inputs, batch.num_tokens, states, int(batch.context_lens.max()), together)

    def _replay(self, batch: Batch, width: int, states: Sequence[State], page_size: int) -> Graph:
        key = size, width, capacity = _kind(batch.num_sequences, width, int(batch.context_lens.max()))
        if key not in self._graphs:
            self._graphs[key] = self._capture(size * width, capacity, states)
        graph = self._graphs[key]
        stage(batch, size * width, page_size, graph.inputs)
        graph.graph.replay()
        return graph

    def graph(self, num_sequences: int, width: int, context: int) -> Graph:
        """The one that computes such a step. Raises KeyError before the first of its kind."""
        return self._graphs[_kind(num_sequences, width, context)]

    def _capture(self, num_rows: int, room: int, states: Sequence[State]) -> Graph:
        """Record a step of so many rows, whose contexts are no longer than `room`."""
        inputs = nobodys(num_rows, self.device)
        num_pages, page_size = states[0].latents.shape[:2]
        capacity = min(room, num_pages * page_size)

        def compute() -> tuple[torch.Tensor, torch.Tensor]:
            found = self._hidden(inputs, num_rows, states, capacity)
            return found, cuda_glm_layer.logits(found, self.ends.head, pdl=self.pdl)

        graph, (found, logits) = self.recorder.record(compute)
        return Graph(graph, inputs, captured.lent(found), captured.lent(logits))

    def _hidden(
        self,
        inputs: torch.Tensor,
        num_rows: int,
        states: Sequence[State],
        capacity: int,
        together: tuple[Span, ...] = (),
    ) -> torch.Tensor:
        """The last norm's output [T, hidden]."""
        x, rows = begun(inputs, num_rows, self.ends, self.frequencies, self.group)
        selected = triton_index.empty(num_rows, self.config.index_topk, self.device)
        step = Step(self.config, self.group, rows, selected, capacity, self.pdl, self.latent, together)
        delta = None
        for layer, state in zip(self._layers, states, strict=True):
            x, delta = cuda_glm_layer.forward(x, delta, layer, state, step)
        return triton_dense.add_rms_norm(x, delta, self.ends.norm, self.config.rms_norm_eps)


def _sampled(rows: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The sampled ones of a step's rows [T, ..]."""
    if len(batch.sampled_rows) == batch.num_tokens:
        return rows
    return rows[put(batch.sampled_rows, torch.int32, rows.device)]


def spans(batch: Batch, page_ids: torch.Tensor, num_pages: int, config: GlmConfig) -> tuple[Span, ...]:
    """The rows of sequences that have many in a step, whose page tables are on the device, of so many pages."""
    if not triton_prompt.suits(config.qk_nope_head_dim):
        return ()
    starts, contexts, tables = (each.tolist() for each in (batch.query_starts, batch.context_lens, batch.page_starts))
    return tuple(
        triton_prompt.spanned(
            Span(first, last, context, page_ids[begin:end]), num_pages, config.num_heads, config.index_topk
        )
        for (first, last), context, (begin, end) in zip(pairwise(starts), contexts, pairwise(tables), strict=True)
        if last - first >= LEAST_TOGETHER
    )  # fmt: skip


def views(pool: torch.Tensor, layout: KvLayout, config: GlmConfig, names: tuple[str, str]) -> list[State]:
    """The state of each layer in the classes `names` (latents, index keys). `pool` is uint8 [pages, page_bytes]."""
    latents, keys = (view.state_class(layout, name) for name in names)
    each = view.state_view(pool, latents, (latents.num_layers, layout.page_size, config.latent_dim)).unbind(1)
    own = iter(view.state_view(pool, keys, (keys.num_layers, layout.page_size, config.index_head_dim)).unbind(1))
    selects = config.full_layers[: len(each)]
    return [
        State(state, next(own) if full else None, index == 0)
        for index, (state, full) in enumerate(zip(each, selects, strict=True))
    ]


def _kind(num_sequences: int, width: int, context: int) -> tuple[int, int, int]:
    """Sequences, tokens of each and room for a context of the graph that computes such a step."""
    return GRAPH_SIZES[bisect_left(GRAPH_SIZES, num_sequences)], width, room(context)


def recorded(max_context: int) -> Recorded:
    """Which steps are recorded of a model with such a context."""
    rooms = [LEAST_ROOM]
    while rooms[-1] < max_context:
        rooms.append(rooms[-1] * MORE_ROOM)
    return Recorded(GRAPH_SIZES, MAX_GRAPH_WIDTH, tuple(rooms))


def room(context: int) -> int:
    """That of the graphs which fit such a context."""
    found = LEAST_ROOM
    while found < context:
        found *= MORE_ROOM
    return found


def begun(
    inputs: torch.Tensor, num_rows: int, ends: Ends, frequencies: torch.Tensor, group: Group
) -> tuple[torch.Tensor, Rows]:
    """The tokens of inputs that are laid out as `Graph` says, embedded [T, hidden], and their rows."""
    token_ids, positions, slots, starts = inputs[: 4 * num_rows].view(4, num_rows)
    part, cos, sin = triton_begin.begin(token_ids, positions, ends.embedding, ends.first_token, frequencies)
    return group.sum(part), Rows(positions, slots, starts, inputs[4 * num_rows :], cos, sin)


def on_device(batch: Batch, page_size: int, device: torch.device) -> torch.Tensor:
    """A step laid out as `Graph` says, on the device."""
    places = torch.cat((torch.from_numpy(_places(batch, page_size)).flatten(), batch.page_ids, _owners(batch)))
    inputs = torch.cat((put(batch.token_ids, torch.int32, device), put(places, torch.int32, device)))
    if batch.moved is not None:
        triton_moved.move(inputs, batch.num_tokens, batch, page_size)
    return inputs


def _owners(batch: Batch) -> torch.Tensor:
    """What moving a step's rows asks for, behind its inputs."""
    return torch.from_numpy(triton_moved.owners(batch)) if batch.moved is not None else batch.page_ids[:0]


def nobodys(num_rows: int, device: torch.device) -> torch.Tensor:
    """Inputs of a graph, laid out as `Graph` says, whose rows belong to nobody."""
    inputs = torch.zeros(5 * num_rows + MAX_GRAPH_PAGES, dtype=torch.int32, device=device)
    inputs[2 * num_rows : 3 * num_rows] = NOBODY
    return inputs


def stage(batch: Batch, num_rows: int, page_size: int, inputs: torch.Tensor, copied: triton_moved.Copies = ()) -> None:
    """Copy a step of at most `num_rows` rows to where a graph finds it, by pinned memory of its own: a step before may
    still wait to be copied. In numpy, whose small operations take a fifth of torch's time. `copied` is copied besides.

    Rows that fill the step up write nothing, and attend to some token without anybody reading what they find.
    """
    num_pages, owners = len(batch.page_ids), _owners(batch).numpy()
    staging = torch.empty(4 * num_rows + num_pages + len(owners), dtype=torch.int32, pin_memory=True)
    values = staging.numpy()
    rows = values[: 4 * num_rows].reshape(4, num_rows)
    rows[:, batch.num_tokens :] = 0
    rows[2, batch.num_tokens :] = NOBODY
    if not batch.token_ids.is_cuda:
        rows[0, : batch.num_tokens] = batch.token_ids.numpy()
    rows[1:, : batch.num_tokens] = _places(batch, page_size)
    values[4 * num_rows : 4 * num_rows + num_pages] = batch.page_ids.numpy()
    values[4 * num_rows + num_pages :] = owners
    inputs[: len(staging)].copy_(staging, non_blocking=True)
    chosen = batch.token_ids if batch.token_ids.is_cuda else None  # by a step that the host has not heard of yet
    if chosen is not None and batch.moved is None:
        inputs[: batch.num_tokens].copy_(chosen)
    if copied or batch.moved is not None:
        triton_moved.move(inputs, num_rows, batch, page_size, chosen, copied)


def _places(batch: Batch, page_size: int) -> NDArray[np.int32]:
    """[3, T]: positions, slots, places of page tables."""
    positions, page_ids = batch.positions.numpy(), batch.page_ids.numpy()
    starts = batch.page_starts.numpy()[:-1].repeat(np.diff(batch.query_starts.numpy()))
    pages, offsets = np.divmod(positions, page_size)
    return np.stack((positions, page_ids[starts + pages] * page_size + offsets, starts)).astype(np.int32, copy=False)
