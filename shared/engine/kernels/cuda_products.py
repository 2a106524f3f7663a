"""Products of few tokens by CUDA kernels of our own, with weights in packed NVFP4 or in bf16.

`cuda/products.cu` has them for any GPU and number of tokens, `cuda/wide.cu` for Hopper, packed weights and more than eight.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from shared.engine.kernels.w4a16 import CHUNK, ROWS, PackedWeight, Weight

Pointer, Int = ctypes.c_void_p, ctypes.c_int
PLAIN, GATED, RESIDUAL, SPLIT = range(4)
WARPS = 8
MAX_TOKENS = 64
MIN_WIDE = 9  # tokens
MAX_PASSES = 3  # of 64 tokens each, in which many are multiplied faster than with weights that are dequantized first
DENSE_STEP = 64  # columns
MIDDLING, TALL = 5120, 16_384  # rows
WIDE_MULTIPLE = 8  # rows, of gate and up together: a thread finishes four
MAX_BLOCKS = 264  # two on each of an H100's multiprocessors


class Product(ctypes.Structure):
    """As products.cuh has it."""

    _fields_ = (
        *((name, Pointer) for name in ("weights", "scales", "factors", "bias", "x", "squares_in", "next_norm")),
        *((name, Pointer) for name in ("out", "residual", "squares_out")),
        *((name, Int) for name in ("num_tokens", "num_rows", "num_columns")),
        *((name, Int) for name in ("num_squares_in", "num_squares_out")),
        *((name, Int) for name in ("epilogue", "warps_rows", "cluster")),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut up: eights of tokens and tiles of rows for a warp; warps of a block that have rows of their
    own, the others sharing out columns; blocks that share out columns. A wide one is computed by `cuda/wide.cu`."""

    eights: int
    row_tiles: int
    warps_rows: int
    cluster: int
    is_wide: bool = False

    def num_blocks(self, num_rows: int) -> int:
        """Of one matrix."""
        return self._groups(num_rows) * self.cluster

    def num_squares(self, num_rows: int) -> int:
        """How many sums of squares a token has of one matrix: blocks of a cluster share out rows, or in a wide product
        tokens."""
        return self._groups(num_rows) * (1 if self.is_wide else self.cluster)

    def _groups(self, num_rows: int) -> int:
        return -(-num_rows // (ROWS * self.row_tiles * self.warps_rows))


@dataclass(frozen=True, slots=True)
class Normed:
    """Activations on their way through a norm: x [T, K] times the norm's weight, and float32 [T, B] sums of squares of
    what they were before. Their product is divided by the root of the mean afterwards."""

    x: torch.Tensor
    squares: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Residual:
    """Where a product is added to [T, N], and the weight [N] of the norm that comes next."""

    stream: torch.Tensor
    next_norm: torch.Tensor


class CudaProducts:
    """Satisfies `w4a16.Products`, and fuses what a decoder has around its products. `plan` says how to cut one up: of
    (packed, tokens, rows, columns)."""

    def __init__(self, library: ctypes.CDLL, plan: Callable[[bool, int, int, int], Plan] | None = None) -> None:
        self.library, self._plan = library, plan or (planned_wide if hasattr(library, "forebay_product_wide") else planned)

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [M, K] times W' [M, N], plus `bias`."""
        rows, passes = _rows(weight), -(-len(x) // MAX_TOKENS)
        is_wide = passes > 1 and self._plan(isinstance(weight, PackedWeight), MAX_TOKENS, rows, x.shape[1]).is_wide
        if passes > (MAX_PASSES if is_wide else 1):
            return F.linear(x, self.dequantized(weight), bias)
        out = x.new_empty(len(x), rows)
        for part, into in zip(x.split(MAX_TOKENS), out.split(MAX_TOKENS), strict=True):
            self._run(weight, part, Product(bias=_at(bias), out=_at(into), epilogue=PLAIN))
        return out

    def normed_linear(self, normed: Normed, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As `linear`, of what a norm gives."""
        out = normed.x.new_empty(len(normed.x), _rows(weight))
        self._run(weight, normed.x, _normed(normed, Product(bias=_at(bias), out=_at(out), epilogue=PLAIN)))
        return out

    def gated(self, normed: Normed, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """silu(gate) * up [T, I] of `weight` [2 I, K], gate first."""
        out = normed.x.new_empty(len(normed.x), _rows(weight) // 2)
        self._run(weight, normed.x, _normed(normed, Product(bias=_at(bias), out=_at(out), epilogue=GATED)))
        return out

    def added(
        self, x: torch.Tensor, weight: Weight, residual: Residual, eps: float, bias: torch.Tensor | None = None
    ) -> Normed:
        """Add the product to the residual stream, in place; return what the next norm takes."""
        rows = _rows(weight)
        plan = self._plan(isinstance(weight, PackedWeight), len(x), rows, x.shape[1])
        out = x.new_empty(len(x), rows)
        squares = x.new_empty((len(x), plan.num_squares(rows)), dtype=torch.float32)
        product = Product(
            bias=_at(bias),
            out=_at(out),
            residual=_at(residual.stream),
            next_norm=_at(residual.next_norm),
            squares_out=_at(squares),
            num_squares_out=squares.shape[1],
            epilogue=RESIDUAL,
        )
        self._run(weight, x, product)
        return Normed(out, squares, eps)

    def begun(self, x: torch.Tensor, norm: torch.Tensor, eps: float) -> Normed:
        """A residual stream [T, K] before its first norm."""
        out, squares = torch.empty_like(x), x.new_empty((len(x), 1), dtype=torch.float32)
        self._call("forebay_begin", _at(x), _at(norm), len(x), x.shape[1], _at(out), _at(squares), _stream(x))
        return Normed(out, squares, eps)

    def dequantized(self, weight: Weight) -> torch.Tensor:
        """bf16 [N, K], rows in their old order."""
        if isinstance(weight, torch.Tensor):
            return weight
        out = torch.empty(weight.num_rows, weight.num_columns, dtype=torch.bfloat16, device=weight.codes.device)
        product = Product(out=_at(out), epilogue=GATED if weight.gated else PLAIN)
        self._call("forebay_dequantize", ctypes.byref(_weighed(weight, product)), _stream(out))
        return out

    def _run(self, weight: Weight, x: torch.Tensor, product: Product) -> None:
        packed, rows = isinstance(weight, PackedWeight), _rows(weight)
        plan = self._plan(packed, len(x), rows, x.shape[1])
        _weighed(weight, product)
        if isinstance(weight, PackedWeight) and weight.gated and product.epilogue == PLAIN:
            product.epilogue = SPLIT  # rows come in their old order
        product.x, product.num_tokens = _at(x), len(x)
        product.warps_rows, product.cluster = plan.warps_rows, plan.cluster
        if plan.is_wide:
            self._call("forebay_product_wide", ctypes.byref(product), plan.eights, _stream(x))
            return
        sizes = int(packed), plan.eights, plan.row_tiles
        self._call("forebay_product", ctypes.byref(product), *sizes, _stream(x))

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self.library, name)(*arguments)
        if error:
            raise RuntimeError(f"{name}: {self.library.forebay_error(error).decode()}")


def suits(weight: Weight) -> bool:
    """Whether the kernels can read a matrix: packed ones always, others if they are made up of whole tiles."""
    return isinstance(weight, PackedWeight) or not (weight.shape[0] % ROWS or weight.shape[1] % DENSE_STEP)


def planned(packed: bool, num_tokens: int, num_rows: int, num_columns: int) -> Plan:
    """The cut that was fastest on an H100 (docs/LOG.md): the more tokens, the more rows share what a warp reads of
    them, as far as there are rows enough for all multiprocessors."""
    eights, steps = _eights(num_tokens), -(-num_columns // (CHUNK if packed else DENSE_STEP))
    is_tall = num_rows >= TALL
    row_tiles = 2 if eights == 8 or (packed and num_rows > MIDDLING and eights <= 2) or (eights >= 2 and is_tall) else 1
    warps_rows = 1
    if is_tall and (packed or eights > 1):
        warps_rows = 8 if eights == 8 else 4
    elif num_rows > MIDDLING and eights >= 4:
        warps_rows = 2
    while warps_rows < WARPS and WARPS // warps_rows > steps:
        warps_rows *= 2
    return Plan(eights, row_tiles, warps_rows, 1)


def planned_wide(packed: bool, num_tokens: int, num_rows: int, num_columns: int) -> Plan:
    """The same for a GPU that has wide products: so many blocks share out columns that there are two for each
    multiprocessor, where that gives each a few steps."""
    if not packed or num_tokens < MIN_WIDE or num_rows % WIDE_MULTIPLE:
        return planned(packed, num_tokens, num_rows, num_columns)
    groups, steps = -(-num_rows // (ROWS * WARPS)), -(-num_columns // CHUNK)
    cluster = next((size for size in (8, 4, 2) if groups * size <= MAX_BLOCKS and size * 4 <= steps), 1)
    return Plan(_eights(num_tokens), 1, WARPS, cluster, is_wide=True)


def load(path: Path) -> ctypes.CDLL:
    """The library that `build.cuda_library` makes."""
    library = ctypes.CDLL(str(path))
    library.forebay_product.argtypes = (ctypes.POINTER(Product), Int, Int, Int, Pointer)
    library.forebay_dequantize.argtypes = (ctypes.POINTER(Product), Pointer)
    library.forebay_begin.argtypes = (Pointer, Pointer, Int, Int, Pointer, Pointer, Pointer)
    if hasattr(library, "forebay_product_wide"):  # on Hopper
        library.forebay_product_wide.argtypes = (ctypes.POINTER(Product), Int, Pointer)
    library.forebay_error.argtypes, library.forebay_error.restype = (Int,), ctypes.c_char_p
    return library


def _eights(num_tokens: int) -> int:
    return next(eights for eights in (1, 2, 4, 8) if min(num_tokens, MAX_TOKENS) <= 8 * eights)


def _rows(weight: Weight) -> int:
    return weight.num_rows if isinstance(weight, PackedWeight) else weight.shape[0]


def _normed(normed: Normed, product: Product) -> Product:
    product.squares_in, product.num_squares_in, product.eps = _at(normed.squares), normed.squares.shape[1], normed.eps
    return product


def _weighed(weight: Weight, product: Product) -> Product:
    if isinstance(weight, PackedWeight):
        product.weights, product.scales, product.factors = _at(weight.codes), _at(weight.scales), _at(weight.factors)
        product.num_rows, product.num_columns = weight.num_rows, weight.num_columns
    else:
        product.weights, (product.num_rows, product.num_columns) = _at(weight), weight.shape
    return product


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stream(tensor: torch.Tensor) -> int:
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
