"""The dense decoder on a GPU: kernels of our own, decode steps as CUDA graphs, FlashInfer for prompts.

A step whose sequences all compute equally many tokens (decode: one; verification of drafts: one more than there are
drafts) is replayed as a graph, padded to the next size; other steps, prefill above all, are launched kernel by kernel.
Of few tokens a layer is six kernels, each of which begins while the one before it ends: norms, gates and residuals are
parts of the products (`kernels.cuda_products`). Of very few, with NVFP4, all layers are one kernel where it can be had
(`kernels.cuda_layers`). Matrices in NVFP4 stay packed; many tokens have them dequantized.

Of several ranks each has its share of heads, MLP and vocabulary. What ends a block is summed over them by a kernel of
its own then, which takes the residual and the next norm over from the product.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from shared.engine.api import Recorded
from shared.engine.batch import Batch
from shared.engine.kernels import cuda_layers, cuda_products, product_plan, triton_dense, triton_paged, w4a4
from shared.engine.kernels.cuda_layers import CudaLayers, Table
from shared.engine.kernels.cuda_products import Activations, CudaProducts, Normed, Residual
from shared.engine.kernels.dequantized_ahead import DequantizedAhead
from shared.engine.kernels.flashinfer_paged import PagedAttention, PagedShape
from shared.engine.kernels.registry import Candidate, choose
from shared.engine.kernels.w4a16 import PackedWeight, Weight
from shared.engine.layers import captured, rope
from shared.engine.layers.vocabulary import Embedding
from shared.engine.models.config import DenseConfig
from shared.engine.models.weights import DenseWeights, LayerOf
from shared.engine.parallel.group import Group
from shared.engine.pinned import put

GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64)
MAX_GRAPH_WIDTH = 8
MAX_GRAPH_PAGES = 1 << 17
MAX_FUSED_DENSE = 8  # tokens; cuBLAS takes bf16 matrices faster beyond
NOBODY = -1
MATRICES = 4  # of a layer

# (queries [T, H, D], one layer's kv) -> [T, H, D]
Attend = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Matrix = Weight | w4a4.Weight


@dataclass(frozen=True, slots=True)
class Graph:
    """A captured step. Its inputs lie one behind the other in `inputs`: token ids, positions and slots of T rows, S
    context lengths, S + 1 page starts, page ids. `logits`, float32, are there until the next graph is replayed."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    counters: torch.Tensor  # of attention's splits; the graph has but its address
    logits: torch.Tensor


class CudaDecoder:
    """Satisfies `models.llama.Decoder`, for batches in host memory and weights and pages on the GPU. Without `products`
    everything is dequantized. With `fp4`, what is stored for products in FP4 has them, of few tokens and of many.
    `attention` names the kernels for prompts, whose packed matrices stay dequantized as far as `dequantized_bytes` go.
    `config` is that of this rank's share, but for the vocabulary, which is the whole one."""

    num_torch_threads = 1
    recorded: Recorded | None = Recorded(GRAPH_SIZES, MAX_GRAPH_WIDTH)

    def __init__(
        self,
        config: DenseConfig,
        weights: DenseWeights,
        _num_threads: int,
        products: CudaProducts | None,
        group: Group,
        fp4: w4a4.Products | None = None,
        attention: str = "auto",
        dequantized_bytes: int = 0,
    ) -> None:
        self._config, self._group, self._attention = config, group, attention
        embedding, self._norm = weights.embedding(), weights.final_norm()
        self._embedding = Embedding(embedding, config.vocab_size, group)
        self._head = _head(weights, embedding, group, is_packed=products is not None, is_fp4=fp4 is not None)
        self._device = device = embedding.device
        self._frequencies = rope.inverse_frequencies(config).to(device)
        layers = tqdm(range(config.num_layers), "loading", unit=" layers", disable=None)
        read = weights.packed_layer if products else weights.layer
        self._fusible: list[LayerOf[Weight]] = [] if fp4 else [read(index) for index in layers]
        self._layers: Sequence[LayerOf[Matrix]] = self._fusible or [weights.fp4_layer(index) for index in layers]
        self._products, self._fp4 = products, fp4
        matrices = [self._head] + [m for w in self._layers for m in (w.qkv, w.output, w.gate_up, w.down)]
        suits = products is not None and all(map(_is_fusible, matrices))
        is_packed = any(isinstance(matrix, PackedWeight) for matrix in matrices)
        self._max_fused = (product_plan.MAX_TOKENS if is_packed else MAX_FUSED_DENSE) if suits else 0
        self._ahead = dequantized_ahead(self._layers, products, dequantized_bytes)
        self._whole = layers_at_once(config, self._fusible, products, group)
        self._graphs: dict[tuple[int, int], Graph] = {}
        self.recorder = captured.Recorder(device)
        self._paged: PagedAttention | None = None

    def __call__(self, batch: Batch, kv: torch.Tensor) -> torch.Tensor:
        """Logits float32 [R, vocab_size], to be read before the next step is launched, or by work that is launched
        before it. `kv` [pages, layers, 2, Hkv, page_size, D]."""
        width, rest = divmod(batch.num_tokens, batch.num_sequences)
        uniform = not rest and bool((batch.query_starts.diff() == width).all())
        fits = batch.num_sequences <= GRAPH_SIZES[-1] and len(batch.page_ids) < MAX_GRAPH_PAGES
        if uniform and fits and width <= MAX_GRAPH_WIDTH:
            return self._replay(batch, width, kv)
        config = self._config
        shape = PagedShape(
            config.num_heads, config.num_kv_heads, config.head_dim, kv.shape[4], kv.dtype, self._attention
        )
        self._paged = self._paged or PagedAttention(shape, self._device)
        by_rows = self._paged.plan(batch)
        on_host = [] if batch.token_ids.is_cuda else [batch.token_ids]
        rows = put(torch.stack((*on_host, batch.positions, _slots(batch, kv.shape[4]))), torch.int32, self._device)
        if not on_host:
            rows = torch.cat((batch.token_ids[None].int(), rows))
        wanted = put(batch.sampled_rows, torch.int32, self._device)
        x = self._hidden(rows, self._paged, kv, wanted, by_rows=by_rows)
        if not len(x):
            return x.new_empty((0, config.vocab_size), dtype=torch.float32)
        return self._group.join(self._product(x, self._head)).float()

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
            return graph.logits[: batch.num_tokens]
        return graph.logits[put(batch.sampled_rows, torch.int32, self._device)]

    def _capture(self, size: int, width: int, kv: torch.Tensor) -> Graph:
        """Record a step of `size` sequences of `width` tokens each."""
        num_rows = size * width
        inputs = torch.zeros(3 * num_rows + 2 * size + 1 + MAX_GRAPH_PAGES, dtype=torch.int32, device=self._device)
        inputs[2 * num_rows : 3 * num_rows] = NOBODY
        inputs[3 * num_rows : 3 * num_rows + size] = width
        rows, table = inputs[: 3 * num_rows].view(3, num_rows), inputs[3 * num_rows :]
        lengths, starts, ids = table[:size], table[size : 2 * size + 1], table[2 * size + 1 :]
        num_done = triton_paged.counters(size, self._config.num_kv_heads, self._device)

        def attend(q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
            return triton_paged.attend(q, pages, ids, starts, lengths, num_done)

        def logits() -> torch.Tensor:
            return self._group.join(computed()).float()

        def computed() -> torch.Tensor:
            if self._products is not None and num_rows <= self._max_fused:
                if self._whole is not None and self._whole.takes(size, width):
                    return self._at_once(self._products, self._whole, rows, Table(rows[2], ids, starts, lengths), kv)
                return self._fused(self._products, rows, attend, kv)
            return self._product(self._hidden(rows, attend, kv), self._head)

        graph, found = self.recorder.record(logits)
        return Graph(graph, inputs, num_done, captured.lent(found))

    def _hidden(
        self,
        rows: torch.Tensor,
        attend: Attend,
        kv: torch.Tensor,
        wanted: torch.Tensor | None = None,
        *,
        by_rows: bool = False,
    ) -> torch.Tensor:
        """The last norm's output [T, hidden], or its `wanted` rows, int32 [R]. `rows` int32 [3, T]: token ids,
        positions and slots. With `by_rows` attention has keys and values with the queries."""
        token_ids, positions, slots = rows
        x = self._embedding(token_ids)
        angles = rope.table(self._frequencies, positions)
        eps, delta = self._config.rms_norm_eps, None
        for index, layer in enumerate(self._layers):
            normed = triton_dense.add_rms_norm(x, delta, layer.input_norm, eps)
            qkv = self._product(normed, layer.qkv, layer.qkv_bias)
            q = self._rotated(qkv, angles, layer, slots, kv[:, index], in_place=by_rows)
            if wanted is not None and index + 1 == len(self._layers):
                # Of the others nothing is read behind the last layer's keys and values: a prompt's last row is enough.
                if not len(wanted):
                    return x[:0]
                attended, x = attend(q, kv[:, index]).flatten(1)[wanted], x[wanted]
            else:
                attended = attend(q, kv[:, index]).flatten(1)
            delta = self._onto(x, attended, layer.output, layer.output_bias)
            normed = triton_dense.add_rms_norm(x, delta, layer.post_norm, eps)
            inner = triton_dense.silu_mul(self._product(normed, layer.gate_up, layer.gate_up_bias))
            delta = self._onto(x, inner, layer.down, layer.down_bias)
        return triton_dense.add_rms_norm(x, delta, self._norm, eps)

    def _fused(self, products: CudaProducts, rows: torch.Tensor, attend: Attend, kv: torch.Tensor) -> torch.Tensor:
        """Logits bf16 [T, vocab_size] of few tokens; `rows` as in `_hidden`."""
        token_ids, positions, slots = rows
        eps, layers = self._config.rms_norm_eps, self._fusible
        assert not isinstance(self._head, w4a4.Weight), "nothing is fused where it is"
        x, angles = self._embedding(token_ids), rope.table(self._frequencies, positions)
        normed = products.begun(x, layers[0].input_norm, eps, layers[0].qkv)
        for index, layer in enumerate(layers):
            qkv = products.normed_linear(normed, layer.qkv, layer.qkv_bias)
            attended = attend(self._rotated(qkv, angles, layer, slots, kv[:, index]), kv[:, index]).flatten(1)
            normed = self._added(products, attended, layer.output, Residual(x, layer.post_norm), layer.output_bias)
            inner = products.gated(normed, layer.gate_up, layer.gate_up_bias)
            next_norm = layers[index + 1].input_norm if index + 1 < len(layers) else self._norm
            normed = self._added(products, inner, layer.down, Residual(x, next_norm), layer.down_bias)
        if isinstance(self._head, torch.Tensor) and len(x) > MAX_FUSED_DENSE:
            return F.linear(triton_dense.add_rms_norm(x, None, self._norm, eps), self._head)
        return products.normed_linear(normed, self._head)

    def _at_once(
        self, products: CudaProducts, layers: CudaLayers, rows: torch.Tensor, table: Table, kv: torch.Tensor
    ) -> torch.Tensor:
        """As `_fused`, of very few tokens."""
        token_ids, positions, _ = rows
        assert not isinstance(self._head, w4a4.Weight), "all layers are at once only where it is none"
        x, angles = self._embedding(token_ids), rope.table(self._frequencies, positions)
        layers(x, angles, table, kv)
        return products.normed_linear(products.begun(x, self._norm, self._config.rms_norm_eps, self._head), self._head)

    def _rotated(
        self,
        qkv: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        layer: LayerOf[Matrix],
        slots: torch.Tensor,
        kv: torch.Tensor,
        *,
        in_place: bool = False,
    ) -> torch.Tensor:
        norms, eps = (layer.q_norm, layer.k_norm), self._config.rms_norm_eps
        return triton_dense.rotate_and_append(qkv, angles, norms, eps, slots, kv, in_place=in_place)

    def _added(
        self, products: CudaProducts, x: Activations, weight: Weight, residual: Residual, bias: torch.Tensor | None
    ) -> Normed:
        """Add a product, summed over the ranks, to the residual stream; what the next norm takes."""
        eps = self._config.rms_norm_eps
        if self._group.num_ranks == 1:
            return products.added(x, weight, residual, eps, bias)
        part = products.linear(x, weight, self._once(bias))
        return Normed(*self._group.add(part, residual.stream, residual.next_norm), eps)

    def _onto(
        self, stream: torch.Tensor, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Add a product to the residual stream; or what is left to add to it, where cuBLAS does not multiply, or ranks
        have parts of the product. cuBLAS adds before it rounds, and the norm that comes next has one tensor to read."""
        if self._group.num_ranks > 1 or bias is not None or not self._is_multiplied_dense(weight, len(x)):
            return self._group.sum(self._product(x, weight, self._once(bias)))
        with self._dense(weight) as matrix:
            stream.addmm_(x, matrix.t())
        return None

    def _once(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """What every rank has whole, for one of them to add."""
        return bias if self._group.rank == 0 else None

    def _product(self, x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
        if self._is_multiplied_dense(weight, len(x)):
            with self._dense(weight) as matrix:
                return F.linear(x, matrix, bias)
        if isinstance(weight, w4a4.Weight):
            assert self._fp4 is not None, "none is read without it"
            return self._fp4.linear(x, weight, bias)
        assert self._products is not None, "nothing is packed without it"
        return self._products.linear(x, weight, bias)

    def _is_multiplied_dense(self, weight: Matrix, num_tokens: int) -> bool:
        """Whether cuBLAS multiplies so many tokens with a matrix."""
        if isinstance(weight, PackedWeight):
            return self._products is not None and not self._products.stays_packed(weight, num_tokens)
        return isinstance(weight, torch.Tensor)

    def _dense(self, weight: Matrix) -> AbstractContextManager[torch.Tensor]:
        """A matrix as cuBLAS takes it, for products that are launched within."""
        if not isinstance(weight, PackedWeight):
            assert isinstance(weight, torch.Tensor), "those in FP4 are multiplied as they are"
            return nullcontext(weight)
        if self._ahead is not None and self._ahead.has(weight) and not torch.cuda.is_current_stream_capturing():
            return self._ahead.dequantized(weight, self._device)
        assert self._products is not None, "nothing is packed without it"
        return nullcontext(self._products.dequantized(weight))


def dequantized_ahead(
    layers: Sequence[LayerOf[Matrix]], products: CudaProducts | None, kept_bytes: int
) -> DequantizedAhead | None:
    """Where all matrices of all layers are packed."""
    matrices = [[m for m in (w.qkv, w.output, w.gate_up, w.down) if isinstance(m, PackedWeight)] for w in layers]
    if products is None or not layers or any(len(each) < MATRICES for each in matrices):
        return None
    return DequantizedAhead(products, matrices, kept_bytes)


def layers_at_once(
    config: DenseConfig, layers: Sequence[LayerOf[Weight]], products: CudaProducts | None, group: Group
) -> CudaLayers | None:
    """All layers as one kernel, where that can be."""
    if products is None or not layers:
        return None
    given = [
        cuda_layers.Layer(
            (w.qkv, w.output, w.gate_up, w.down),
            (w.qkv_bias, w.output_bias, w.gate_up_bias, w.down_bias),
            (w.input_norm, w.post_norm, w.q_norm, w.k_norm),
        )
        for w in layers
    ]
    obstacle = "ranks meet between products" if group.num_ranks > 1 else cuda_layers.obstacle(products, config, given)
    found: Sequence[Candidate[CudaLayers | None]] = (
        Candidate("one kernel for all layers", obstacle, None if obstacle else CudaLayers(products, config, given)),
        Candidate("a kernel for each product", None, None),
    )
    return choose(found, "auto").built


def _head(weights: DenseWeights, embedding: torch.Tensor, group: Group, *, is_packed: bool, is_fp4: bool) -> Matrix:
    """This rank's rows of the head; the last ranks', which may have fewer, are filled up with zeros."""
    config = weights.config
    size = -(-config.vocab_size // group.num_ranks)
    if config.tied_embeddings:
        head: Matrix = embedding
    elif is_fp4:
        head = weights.fp4_head()
    else:
        head = weights.packed_head() if is_packed and config.vocab_size % group.num_ranks == 0 else weights.head()
    if isinstance(head, torch.Tensor) and len(head) < size:
        return F.pad(head, (0, 0, 0, size - len(head)))
    return head


def _is_fusible(matrix: Matrix) -> bool:
    return not isinstance(matrix, w4a4.Weight) and cuda_products.suits(matrix)


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
    In numpy, whose small operations take a fifth of torch's time.
    """
    num_rows, count, used = size * width, batch.num_sequences, batch.num_tokens
    positions, starts, ids = (tensor.numpy() for tensor in (batch.positions, batch.page_starts, batch.page_ids))
    staging = torch.empty(3 * num_rows + 2 * size + 1 + len(ids), dtype=torch.int32, pin_memory=True)
    values = staging.numpy()
    rows = values[: 3 * num_rows].reshape(3, num_rows)
    rows[:2, used:], rows[2, used:] = 0, NOBODY
    if not batch.token_ids.is_cuda:
        rows[0, :used] = batch.token_ids.numpy()
    rows[1, :used] = positions
    pages = ids[starts[:-1].repeat(width) + positions // page_size]
    rows[2, :used] = pages * page_size + positions % page_size
    table = values[3 * num_rows :]
    table[:count], table[count:size] = batch.context_lens.numpy(), width
    table[size : size + count], table[size + count : 2 * size + 1] = starts[:-1], 0
    table[2 * size + 1 :] = ids
    return staging


def _slots(batch: Batch, page_size: int) -> torch.Tensor:
    """Where each row's state goes: page times page size plus the place within it. int32 [T] in host memory."""
    positions, ids, starts = (tensor.numpy() for tensor in (batch.positions, batch.page_ids, batch.page_starts))
    first = starts[:-1].repeat(np.diff(batch.query_starts.numpy()))
    return torch.from_numpy(ids[first + positions // page_size] * page_size + positions % page_size)
