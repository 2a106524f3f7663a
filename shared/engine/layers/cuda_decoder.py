"""The dense decoder on a GPU: fused small kernels, decode steps as CUDA graphs, FlashInfer for prompts.

A step whose sequences all compute equally many tokens (decode: one; verification of drafts: one more than there are
drafts) is replayed as a graph, padded to the next size; other steps, prefill above all, are launched kernel by kernel.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shared.engine.batch import Batch
from shared.engine.kernels import triton_dense, triton_paged
from shared.engine.kernels.flashinfer_paged import PagedAttention, PagedShape
from shared.engine.layers import rope
from shared.engine.models.config import DenseConfig
from shared.engine.models.weights import DenseWeights
from shared.engine.pinned import put

GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MAX_GRAPH_WIDTH = 8
MAX_GRAPH_PAGES = 1 << 17
NOBODY = -1

# (queries [T, H, D], one layer's kv) -> [T, H, D]
Attend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured step. Its inputs lie one behind the other in `inputs`: token ids, positions and slots of T rows, S
    context lengths, S + 1 page starts, page ids."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    logits: torch.Tensor


class CudaDecoder:
    """Satisfies `models.llama.Decoder`, for batches in host memory and weights and pages on the GPU."""

    num_torch_threads = 1

    def __init__(self, config: DenseConfig, weights: DenseWeights, _num_threads: int) -> None:
        self._config = config
        self._embedding, self._norm = weights.embedding(), weights.final_norm()
        self._head = self._embedding if config.tied_embeddings else weights.head()
        self._device = device = self._embedding.device
        self._frequencies = rope.inverse_frequencies(config).to(device)
        self._layers = [weights.layer(index) for index in range(config.num_layers)]
        self._graphs: dict[tuple[int, int], Graph] = {}
        self._paged: PagedAttention | None = None

    def __call__(self, batch: Batch, kv: torch.Tensor) -> torch.Tensor:
        """Logits float32 [R, vocab_size]. `kv` [pages, layers, 2, Hkv, page_size, D]."""
        width, rest = divmod(batch.num_tokens, batch.num_sequences)
        uniform = not rest and bool((batch.query_starts.diff() == width).all())
        fits = batch.num_sequences <= GRAPH_SIZES[-1] and len(batch.page_ids) < MAX_GRAPH_PAGES
        if uniform and fits and width <= MAX_GRAPH_WIDTH:
            return self._replay(batch, width, kv)
        config = self._config
        shape = PagedShape(config.num_heads, config.num_kv_heads, config.head_dim, kv.shape[4], kv.dtype)
        self._paged = self._paged or PagedAttention(shape, self._device)
        self._paged.plan(batch)
        places = torch.stack((batch.positions, _slots(batch, kv.shape[4])))
        token_ids, places = batch.token_ids.to(self._device), put(places, torch.int32, self._device)
        rows = torch.cat((token_ids[None], places))
        x = self._hidden(rows, self._paged, kv)
        return F.linear(x[put(batch.sampled_rows, torch.int32, self._device)], self._head).float()

    def _replay(self, batch: Batch, width: int, kv: torch.Tensor) -> torch.Tensor:
        size = GRAPH_SIZES[bisect_left(GRAPH_SIZES, batch.num_sequences)]
        if (size, width) not in self._graphs:
            self._graphs[size, width] = self._capture(size, width, kv)
        graph = self._graphs[size, width]
        staging = _stage(batch, size, width, kv.shape[4])
        graph.inputs[: len(staging)].copy_(staging, non_blocking=True)
        if batch.token_ids.is_cuda:  # chosen by a step that the host has not heard of yet
            graph.inputs[: batch.num_tokens].copy_(batch.token_ids)
        graph.graph.replay()
        if len(batch.sampled_rows) == batch.num_tokens:
            return graph.logits[: batch.num_tokens].float()
        return graph.logits[put(batch.sampled_rows, torch.int32, self._device)].float()

    def _capture(self, size: int, width: int, kv: torch.Tensor) -> Graph:
        """Record a step of `size` sequences of `width` tokens each."""
        num_rows = size * width
        inputs = torch.zeros(3 * num_rows + 2 * size + 1 + MAX_GRAPH_PAGES, dtype=torch.int32, device=self._device)
        inputs[2 * num_rows : 3 * num_rows] = NOBODY
        inputs[3 * num_rows : 3 * num_rows + size] = width
        rows, table = inputs[: 3 * num_rows].view(3, num_rows), inputs[3 * num_rows :]
        lengths, starts, ids = table[:size], table[size : 2 * size + 1], table[2 * size + 1 :]

        def attend(q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
            return triton_paged.attend(q, pages, ids, starts, lengths)

        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # compiles what is compiled at first use
            F.linear(self._hidden(rows, attend, kv), self._head)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = F.linear(self._hidden(rows, attend, kv), self._head)
        return Graph(graph, inputs, logits)

    def _hidden(self, rows: torch.Tensor, attend: Attend, kv: torch.Tensor) -> torch.Tensor:
        """The last norm's output [T, hidden]. `rows` int32 [3, T]: token ids, positions and slots."""
        token_ids, positions, slots = rows
        x = F.embedding(token_ids, self._embedding)
        angles = rope.table(self._frequencies, positions)
        eps, delta = self._config.rms_norm_eps, None
        for index, layer in enumerate(self._layers):
            normed = triton_dense.add_rms_norm(x, delta, layer.input_norm, eps)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias)
            norms = (layer.q_norm, layer.k_norm)
            q = triton_dense.rotate_and_append(qkv, angles, norms, eps, slots, kv[:, index])
            attended = F.linear(attend(q, kv[:, index]).flatten(1), layer.output, layer.output_bias)
            normed = triton_dense.add_rms_norm(x, attended, layer.post_norm, eps)
            inner = triton_dense.silu_mul(F.linear(normed, layer.gate_up, layer.gate_up_bias))
            delta = F.linear(inner, layer.down, layer.down_bias)
        return triton_dense.add_rms_norm(x, delta, self._norm, eps)


def obstacle(config: DenseConfig, dtype: torch.dtype) -> str | None:
    """Why this decoder cannot serve a model, if it cannot."""
    if dtype != torch.bfloat16:
        return f"FlashInfer attends in bfloat16, not in {str(dtype).removeprefix('torch.')}"
    if config.head_dim not in (64, 128):
        return f"heads of {config.head_dim} values are neither 64 nor 128 wide"
    return None


def _stage(batch: Batch, size: int, width: int, page_size: int) -> torch.Tensor:
    """A step laid out as `Graph` says, in pinned memory of its own: a step before may still wait to be copied. Left out
    are token ids that are on the device.

    Sequences that fill the step up write nothing, and attend to some page without anybody reading what they find.
    """
    num_rows, count = size * width, batch.num_sequences
    staging = torch.empty(3 * num_rows + 2 * size + 1 + len(batch.page_ids), dtype=torch.int32, pin_memory=True)
    rows = staging[: 3 * num_rows].view(3, num_rows)
    rows[:, batch.num_tokens :] = 0
    rows[2, batch.num_tokens :] = NOBODY
    if not batch.token_ids.is_cuda:
        rows[0, : batch.num_tokens] = batch.token_ids
    rows[1, : batch.num_tokens] = batch.positions
    rows[2, : batch.num_tokens] = _slots(batch, page_size)
    table = staging[3 * num_rows :]
    table[:count], table[count:size] = batch.context_lens, width
    table[size : size + count], table[size + count : 2 * size + 1] = batch.page_starts[:-1], 0
    table[2 * size + 1 :] = batch.page_ids
    return staging


def _slots(batch: Batch, page_size: int) -> torch.Tensor:
    """Where each row's state goes: page times page size plus the place within it. int32 [T] in host memory."""
    sequence = torch.repeat_interleave(batch.query_starts.diff())
    pages = batch.page_ids[batch.page_starts[sequence] + batch.positions // page_size]
    return pages * page_size + batch.positions % page_size
