"""All layers of a decode step of few tokens in one CUDA kernel, `cuda/layers.cu`, with weights in packed NVFP4.

Its twin is `layers.decoder.DecoderLayer`, layer after layer.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shared.engine.kernels.cuda_call import call
from shared.engine.kernels.cuda_products import CudaProducts
from shared.engine.kernels.w4a16 import CHUNK, ROWS, PackedWeight, Weight
from shared.engine.models.config import DenseConfig

Pointer, Int = ctypes.c_void_p, ctypes.c_int
HEAD_DIM = 128
MAX_TOKENS, MAX_SPLITS, MAX_QUERIES = 4, 16, 16
THREADS, WARPS, MERGED_BYTES = 256, 8, 4 * 8 * 4 * 132
CHUNK_STEPS, CHUNK_BYTES = 16, 16 * (1024 + 128)
MAX_SHARED_BYTES = 232_448
LAYER_BYTES = 20 * 8
FIXED_BYTES = 8192
MAX_DEPTH, MIN_DEPTH = 12, 3


class Step(ctypes.Structure):
    """As step.cuh has it. What is of shared memory the library fills in."""

    _fields_ = (
        *((name, Pointer) for name in ("layers", "x", "qkv", "attended", "inner", "parts", "maxima", "sums", "kv")),
        *((name, Pointer) for name in ("cos", "sin", "slots", "page_ids", "page_starts", "context_lens", "counters")),
        *((name, ctypes.c_int64) for name in ("page_stride", "layer_stride", "kind_stride", "head_stride")),
        *((name, Int) for name in ("num_layers", "num_sequences", "width", "hidden", "inner_size")),
        *((name, Int) for name in ("num_q", "num_kv", "page_size", "splits", "depth")),
        *((name, Int) for name in ("x_stride", "x_at", "parts_at", "angles_at", "layers_at")),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Table:
    """Where a step's sequences are: slots int32 [T] as `triton_dense.rotate_and_append` takes them, page ids, page
    starts [S + 1] and context lengths [S] as in `Batch`, all on the device."""

    slots: torch.Tensor
    page_ids: torch.Tensor
    page_starts: torch.Tensor
    context_lens: torch.Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer has: matrices and biases of q, k and v together, output, gate and up together (in one tile), and
    down; norms of the input, behind attention, of queries and of keys. Biases and the last two norms may be None."""

    matrices: Sequence[Weight]
    biases: Sequence[torch.Tensor | None]
    norms: Sequence[torch.Tensor | None]


class CudaLayers:
    """The layers of a model, on `num_blocks` multiprocessors. One step at a time: steps share counters."""

    def __init__(
        self,
        products: CudaProducts,
        config: DenseConfig,
        layers: Sequence[Layer],
        num_blocks: int | None = None,
    ) -> None:
        device = _device(layers)
        self._library, self._config = products.library, config
        self._num_blocks = num_blocks or planned_blocks(config, _num_processors(device))
        self._kept = layers  # whose addresses the table has
        self._layers = torch.tensor([_addresses(layer) for layer in layers], dtype=torch.int64, device=device)
        self._counters = torch.zeros(1 + self._num_blocks, dtype=torch.int32, device=device)

    def takes(self, num_sequences: int, width: int) -> bool:
        """Whether a step of so many sequences, of `width` tokens each, is one for this kernel."""
        config = self._config
        queries = config.num_heads // config.num_kv_heads * width
        units = num_sequences * config.num_kv_heads
        if num_sequences * width > MAX_TOKENS or queries > MAX_QUERIES or units > self._num_blocks:
            return False
        return _depth(config, num_sequences * width, self._num_blocks) >= MIN_DEPTH

    def __call__(
        self, x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor], table: Table, kv: torch.Tensor
    ) -> None:
        """Take the residual stream x bf16 [T, hidden] through all layers, in place.

        angles cos, sin float32 [T, D/2]; kv [pages, layers, 2, Hkv, page_size, D], to which new keys and values are
        written.
        """
        config, (num_tokens, hidden) = self._config, x.shape
        num_sequences = len(table.context_lens)
        num_q, num_kv, inner = config.num_heads, config.num_kv_heads, config.intermediate_size
        splits = min(MAX_SPLITS, self._num_blocks // (num_sequences * num_kv))
        widths = (num_q + 2 * num_kv) * HEAD_DIM, num_q * HEAD_DIM, inner
        qkv, attended, middle = (x.new_empty(num_tokens, width) for width in widths)
        parts = x.new_empty((num_tokens, num_q, splits, HEAD_DIM + 2), dtype=torch.float32)
        num_found = num_tokens * num_q * splits
        num_parts = WARPS * num_tokens * _most_rows(config, self._num_blocks)
        found = parts.data_ptr()
        step = Step(
            layers=self._layers.data_ptr(), x=x.data_ptr(), qkv=qkv.data_ptr(), attended=attended.data_ptr(),
            inner=middle.data_ptr(), parts=found, maxima=found + 4 * num_found * HEAD_DIM,
            sums=found + 4 * num_found * (HEAD_DIM + 1), kv=kv.data_ptr(), cos=angles[0].data_ptr(),
            sin=angles[1].data_ptr(), slots=table.slots.data_ptr(), page_ids=table.page_ids.data_ptr(),
            page_starts=table.page_starts.data_ptr(), context_lens=table.context_lens.data_ptr(),
            counters=self._counters.data_ptr(), num_layers=len(self._layers), num_sequences=num_sequences,
            width=num_tokens // num_sequences, hidden=hidden, inner_size=inner, num_q=num_q, num_kv=num_kv,
            page_size=kv.shape[4], splits=splits, depth=MAX_DEPTH, eps=config.rms_norm_eps,
        )  # fmt: skip
        step.page_stride, step.layer_stride, step.kind_stride, step.head_stride = kv.stride()[:4]
        call(self._library, "forebay_layers", x.device, ctypes.byref(step), self._num_blocks, num_parts)


def obstacle(
    products: CudaProducts, config: DenseConfig, layers: Sequence[Layer], num_blocks: int | None = None
) -> str | None:
    """What keeps the kernel from a model's layers, if something does."""
    if not hasattr(products.library, "forebay_layers"):
        return "the GPU's compute capability is below 9.0"
    if not products.library.forebay_layers_fit():
        return "a block has too little shared memory there"
    num_blocks = num_blocks or planned_blocks(config, _num_processors(_device(layers)))
    is_packed = all(isinstance(matrix, PackedWeight) for layer in layers for matrix in layer.matrices)
    # Each thread finishes a row, of gate and up two, and of the residual stream one token of it.
    qkv, hidden, gate_up, _ = (_rows(rows, num_blocks) for rows, _ in _shapes(config))
    has_room = max(qkv, gate_up // 2) <= THREADS and hidden <= THREADS // MAX_TOKENS
    return _first(
        (not is_packed, "not all matrices are in NVFP4"),
        (config.head_dim != HEAD_DIM, f"heads are {config.head_dim} wide, not {HEAD_DIM}"),
        (bool(config.hidden_size % CHUNK or config.intermediate_size % CHUNK), f"sizes are no multiples of {CHUNK}"),
        (_depth(config, 1, num_blocks) < MIN_DEPTH, "a multiprocessor's shared memory is too small for them"),
        (not has_room, f"{num_blocks} blocks are too few for the rows"),
    )


def _first(*found: tuple[bool, str]) -> str | None:
    return next((reason for is_so, reason in found if is_so), None)


def planned_blocks(config: DenseConfig, num_processors: int) -> int:
    """How many blocks share the rows out most evenly: the fewest of those whose largest share is least."""

    def work(num_blocks: int) -> int:
        return sum(_rows(rows, num_blocks) * columns for rows, columns in _shapes(config))

    return min(range(1, num_processors + 1), key=work)


def _depth(config: DenseConfig, num_tokens: int, num_blocks: int) -> int:
    """About how many chunks the ring would have."""
    columns = max(columns for _, columns in _shapes(config))
    activations = 2 * WARPS * num_tokens * (-(-columns // (CHUNK_STEPS * CHUNK)) * 2 * CHUNK + 8)
    activations = max(activations, MERGED_BYTES)
    parts = 4 * WARPS * num_tokens * _most_rows(config, num_blocks)
    others = activations + parts + 4 * num_tokens * HEAD_DIM + LAYER_BYTES * config.num_layers + FIXED_BYTES
    return min(MAX_DEPTH, (MAX_SHARED_BYTES - others) // CHUNK_BYTES)


def _device(layers: Sequence[Layer]) -> torch.device:
    norm = layers[0].norms[0]
    assert norm is not None, "every layer has one"
    return norm.device


def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _shapes(config: DenseConfig) -> list[tuple[int, int]]:
    """Rows and columns of a layer's matrices."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_heads * HEAD_DIM
    return [(heads + 2 * config.num_kv_heads * HEAD_DIM, hidden), (hidden, heads), (2 * inner, hidden), (hidden, inner)]


def _rows(rows: int, num_blocks: int) -> int:
    """A block's share."""
    return -(-rows // (ROWS * num_blocks)) * ROWS


def _most_rows(config: DenseConfig, num_blocks: int) -> int:
    return max(_rows(rows, num_blocks) for rows, _ in _shapes(config))


def _addresses(layer: Layer) -> list[int]:
    """As struct Layer has them."""
    found: list[int] = []
    for matrix, bias in zip(layer.matrices, layer.biases, strict=True):
        assert isinstance(matrix, PackedWeight), "the kernel has an obstacle otherwise"
        found += [_at(matrix.codes), _at(matrix.scales), _at(matrix.factors), _at(bias)]
    return found + [_at(norm) for norm in layer.norms]


def _at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
