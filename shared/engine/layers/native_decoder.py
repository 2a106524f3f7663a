"""The dense decoder as one native call per step: twin of `layers.decoder.TorchDecoder`, for the CPU.

Every sum is taken in an order that depends on positions alone, so results are equal to the bit however a sequence is
chunked, batched or cached.
"""

import ctypes

import torch
from tqdm import tqdm

from shared.engine.api import Recorded
from shared.engine.batch import Batch
from shared.engine.kernels import native
from shared.engine.layers import rope
from shared.engine.models.config import DenseConfig
from shared.engine.models.weights import DenseWeights, LayerWeights

MAX_GROUP = 48
MAX_HEAD_DIM = 256


def obstacle(config: DenseConfig) -> str | None:
    """What keeps the kernels from computing a model of this shape."""
    if config.head_dim % 16 or config.head_dim > MAX_HEAD_DIM or config.head_dim % 32 not in (0, 16):
        return f"head_dim {config.head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}"
    if config.num_heads // config.num_kv_heads > MAX_GROUP:
        return f"more than {MAX_GROUP} query heads share a KV head"
    return None


class NativeDecoder:
    """Token ids to logits, on threads of its own; torch needs one beside them."""

    num_torch_threads = 1
    recorded: Recorded | None = None

    def __init__(self, library: ctypes.CDLL, config: DenseConfig, weights: DenseWeights, num_threads: int) -> None:
        self._library = library
        self._team = native.Team(library, num_threads)
        self._vocab_size = config.vocab_size
        self._frequencies = rope.inverse_frequencies(config)
        self._arena = native.Arena()
        embedding = weights.embedding()
        self._is_bf16 = int(embedding.dtype == torch.bfloat16)
        loading = tqdm(range(config.num_layers), "loading", unit=" layers", disable=None)
        layers = [self._layer(weights.layer(index)) for index in loading]
        self._layers = native.array(layers)
        self._model = native.Model(
            *(config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim),
            *(config.intermediate_size, config.num_layers, config.rms_norm_eps, self._layers),
            self._arena.vector(weights.final_norm()),
            self._arena.linear(weights.head()),
            self._arena.address(embedding),
        )

    def _layer(self, weights: LayerWeights) -> native.Layer:
        arena, bias = self._arena, weights.gate_up_bias
        return native.Layer(
            arena.vector(weights.input_norm),
            arena.linear(weights.qkv, weights.qkv_bias),
            arena.vector(weights.q_norm),
            arena.vector(weights.k_norm),
            arena.linear(weights.output, weights.output_bias),
            arena.vector(weights.post_norm),
            arena.linear(native.interleave(weights.gate_up), None if bias is None else native.interleave(bias)),
            arena.linear(weights.down, weights.down_bias),
        )

    def __call__(self, batch: Batch, kv: torch.Tensor) -> torch.Tensor:
        """Logits float32 [R, vocab_size]. `kv` [pages, layers, 2, Hkv, page_size, D]."""
        cos, sin = rope.table(self._frequencies, batch.positions)
        logits = torch.empty(len(batch.sampled_rows), self._model.head.num_panels * native.PANEL)
        tensors = (
            *(batch.token_ids, batch.positions, batch.query_starts, batch.context_lens, batch.page_starts),
            *(batch.page_ids, batch.sampled_rows, cos, sin, kv),
        )
        step = native.Step(
            *(batch.num_tokens, batch.num_sequences, len(batch.sampled_rows)),
            *(tensor.data_ptr() for tensor in tensors),
            *(kv.stride(0) * kv.itemsize, kv.shape[4], *kv.stride()[1:4]),
            *(logits.data_ptr(), self._workspace_for(batch.num_tokens)),
        )
        self._library.forebay_forward(ctypes.byref(self._model), self._team.handle, self._is_bf16, ctypes.byref(step))
        return logits[:, : self._vocab_size]

    def _workspace_for(self, num_tokens: int) -> int:
        """The address of enough memory for a step."""
        which = ctypes.byref(self._model), self._team.handle, self._is_bf16
        return self._team.workspace(self._library.forebay_workspace_bytes(*which, num_tokens))
