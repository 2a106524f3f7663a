"""Products of few tokens by CUDA kernels of our own, `cuda/products.cu`, with weights in packed NVFP4 or in bf16."""

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
ITEM, ITEM_TOKENS = 8, 64
DENSE_STEP = 64  # columns
MIDDLING, TALL = 5120, 16_384  # rows


class Product(ctypes.Structure):
    """As products.cuh has it."""

    _fields_ = (
        *(
            (name, Pointer)
            for name in ("weights", "scales", "factors", "bias", "x", "squares_in", "next_norm", "items")
        ),
        *((name, Pointer) for name in ("out", "wide_out", "residual", "squares_out")),
        *((name, Int) for name in ("num_tokens", "num_rows", "num_columns")),
        *((name, Int) for name in ("num_squares_in", "num_squares_out")),
        *((name, Int) for name in ("epilogue", "warps_rows", "cluster", "choices")),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Plan:
    """How a product is cut up: eights of tokens and tiles of rows for a warp; warps of a block that have rows of their
    own, the others sharing out columns; blocks that share out columns."""

    eights: int
    row_tiles: int
    warps_rows: int
    cluster: int

    def num_blocks(self, num_rows: int) -> int:
        """Of one matrix."""
        return -(-num_rows // (ROWS * self.row_tiles * self.warps_rows)) * self.cluster


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
        self._library, self._plan = library, plan or planned

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [M, K] times W' [M, N], plus `bias`."""
        rows = _rows(weight)
        if len(x) > MAX_TOKENS:
            return F.linear(x, self.dequantized(weight), bias)
        out = x.new_empty(len(x), rows)
        self._run(weight, x, Product(bias=_at(bias), out=_at(out), epilogue=PLAIN))
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
        squares = x.new_empty((len(x), plan.num_blocks(rows)), dtype=torch.float32)
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

    def experts(
        self,
        x: torch.Tensor,
        gate_up: PackedWeight,
        down: PackedWeight,
        chosen: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        """As Products. Pairs (token, expert) are sorted by expert on the device, so that the weights of each chosen
        expert are read once for every 64 of its tokens."""
        (num_tokens, choices), num_experts = chosen.shape, len(gate_up.codes)
        num_pairs, eights = num_tokens * choices, _eights(num_tokens)
        capacity = 8 * eights
        num_items = min(num_pairs, num_experts + num_pairs // capacity)
        items = chosen.new_empty(ITEM + num_items * (ITEM + ITEM_TOKENS))
        rank, at = chosen.new_empty(num_pairs), _stream(x)
        self._call("forebay_sort_pairs", _at(chosen), num_pairs, num_experts, capacity, _at(rank), _at(items), at)
        inner = x.new_empty(num_pairs, gate_up.num_rows // 2)
        self._run(gate_up, x, Product(out=_at(inner), items=_at(items), epilogue=GATED, choices=choices), num_items)
        parts = x.new_empty((num_pairs, down.num_rows), dtype=torch.float32)
        self._run(down, inner, Product(wide_out=_at(parts), items=_at(items), epilogue=PLAIN), num_items, capacity)
        out = x.new_empty(num_tokens, down.num_rows)
        sizes = num_experts, choices, num_tokens, down.num_rows
        self._call("forebay_combine", _at(parts), _at(chosen), _at(weights), *sizes, _at(out), at)
        return out

    def _run(
        self, weight: Weight, x: torch.Tensor, product: Product, num_items: int = 1, num_tokens: int | None = None
    ) -> None:
        packed, rows = isinstance(weight, PackedWeight), _rows(weight)
        tokens = min(len(x), MAX_TOKENS) if num_tokens is None else num_tokens
        plan = self._plan(packed, tokens, rows, x.shape[1])
        if product.items:
            plan = grouped(plan, x.shape[1])
        _weighed(weight, product)
        if isinstance(weight, PackedWeight) and weight.gated and product.epilogue == PLAIN:
            product.epilogue = SPLIT  # rows come in their old order
        product.x, product.num_tokens = _at(x), tokens
        product.choices = product.choices or 1
        product.warps_rows, product.cluster = plan.warps_rows, plan.cluster
        sizes = int(packed), plan.eights, plan.row_tiles, num_items
        self._call("forebay_product", ctypes.byref(product), *sizes, _stream(x))

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._library, name)(*arguments)
        if error:
            raise RuntimeError(f"{name}: {self._library.forebay_error(error).decode()}")


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


def grouped(plan: Plan, num_columns: int) -> Plan:
    """The same for each expert: there are many, so none has its columns shared out between blocks."""
    steps = -(-num_columns // CHUNK)
    warps_columns = min(WARPS // 2 if plan.eights >= 4 else WARPS, 1 << (steps.bit_length() - 1))
    return Plan(plan.eights, plan.row_tiles, WARPS // warps_columns, 1)


def load(path: Path) -> ctypes.CDLL:
    """The library that `build.cuda_library` makes."""
    library = ctypes.CDLL(str(path))
    library.forebay_product.argtypes = (ctypes.POINTER(Product), Int, Int, Int, Int, Pointer)
    library.forebay_dequantize.argtypes = (ctypes.POINTER(Product), Pointer)
    library.forebay_sort_pairs.argtypes = (Pointer, Int, Int, Int, Pointer, Pointer, Pointer)
    library.forebay_combine.argtypes = (Pointer, Pointer, Pointer, Int, Int, Int, Int, Pointer, Pointer)
    library.forebay_begin.argtypes = (Pointer, Pointer, Int, Int, Pointer, Pointer, Pointer)
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
