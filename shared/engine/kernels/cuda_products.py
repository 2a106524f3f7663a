"""Products of few tokens by CUDA kernels of our own, with weights in packed NVFP4 or in bf16.

`cuda/products.cu` has them for any GPU, `cuda/wide.cu` for Hopper, packed weights and more than a few tokens.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from shared.engine.kernels.cuda_call import call, opened
from shared.engine.kernels.product_plan import DENSE_STEP, MAX_TOKENS, Plan, Planned, planned, planned_wide
from shared.engine.kernels.registry import Candidate, choose
from shared.engine.kernels.w4a16 import CHUNK, ROWS, PackedWeight, Weight

Pointer, Int = ctypes.c_void_p, ctypes.c_int
PLAIN, GATED, RESIDUAL, SPLIT = range(4)
MAX_PASSES = 3  # of 64 tokens each, in which many are multiplied faster than with weights that are dequantized first
ARRANGED_COLUMNS = 64


class Product(ctypes.Structure):
    """As products.cuh has it."""

    _fields_ = (
        *((name, Pointer) for name in ("weights", "scales", "factors", "bias", "x", "squares_in", "next_norm")),
        *((name, Pointer) for name in ("out", "residual", "squares_out")),
        *((name, Int) for name in ("num_tokens", "num_rows", "num_columns")),
        *((name, Int) for name in ("num_squares_in", "num_squares_out")),
        *((name, Int) for name in ("epilogue", "warps_rows", "cluster", "arranged")),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Arranged:
    """Activations [T, K] in the order in which wide products take them: bf16 [K / 64, 16, 32 or 64, 64], filled up with
    zero columns to whole steps, and with rows that mean nothing. Of each token's 64 columns, those of four lanes take
    turns in pairs, and groups of eight values are swizzled (`place` in products.cuh)."""

    values: torch.Tensor
    num_tokens: int
    num_columns: int

    def __len__(self) -> int:
        return self.num_tokens

    def plain(self) -> torch.Tensor:
        """[T, K], in torch."""
        chunks, tokens, _ = self.values.shape
        token, eight = (torch.arange(size, device=self.values.device) for size in (tokens, 8))
        order = token[:, None] % 8 ^ eight
        groups = self.values.view(chunks, tokens, 8, 8).gather(2, order[None, :, :, None].expand(chunks, tokens, 8, 8))
        # [chunk, token, of two eights, of two fours, of two pairs, lane, of two] -> columns as they follow each other
        columns = groups.view(chunks, tokens, 2, 2, 2, 4, 2).permute(1, 0, 5, 2, 3, 4, 6).reshape(tokens, -1)
        return columns[: self.num_tokens, : self.num_columns].contiguous()


Activations = torch.Tensor | Arranged


@dataclass(frozen=True, slots=True)
class Normed:
    """Activations on their way through a norm: x [T, K] times the norm's weight, and float32 [T, B] sums of squares of
    what they were before. Their product is divided by the root of the mean afterwards."""

    x: Activations
    squares: torch.Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Residual:
    """Where a product is added to [T, N], and the weight [N] of the norm that comes next."""

    stream: torch.Tensor
    next_norm: torch.Tensor


class CudaProducts:
    """Satisfies `w4a16.Products`, and fuses what a decoder has around its products. `plan` says how to cut one up; by
    default as the GPU can that the library is for."""

    def __init__(self, library: ctypes.CDLL, plan: Planned | None = None) -> None:
        self.library, self._plan = library, plan or _planned(library)

    def linear(self, x: Activations, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [M, K] times W' [M, N], plus `bias`."""
        if isinstance(x, torch.Tensor) and len(x) > MAX_TOKENS:
            return self._many(x, weight, bias)
        values = x.values if isinstance(x, Arranged) else x
        out = values.new_empty(len(x), _rows(weight))
        self._run(weight, x, Product(bias=_at(bias), out=_at(out), epilogue=PLAIN))
        return out

    def normed_linear(self, normed: Normed, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As `linear`, of what a norm gives."""
        out = normed.squares.new_empty((len(normed.x), _rows(weight)), dtype=torch.bfloat16)
        self._run(weight, normed.x, _normed(normed, Product(bias=_at(bias), out=_at(out), epilogue=PLAIN)))
        return out

    def gated(self, normed: Normed, weight: Weight, bias: torch.Tensor | None = None) -> Activations:
        """silu(gate) * up [T, I] of `weight` [2 I, K], gate first; arranged if the product is a wide one."""
        out, product = self._output(weight, normed.x, _rows(weight) // 2, normed.squares.device)
        product.bias, product.epilogue = _at(bias), GATED
        self._run(weight, normed.x, _normed(normed, product))
        return out

    def added(
        self, x: Activations, weight: Weight, residual: Residual, eps: float, bias: torch.Tensor | None = None
    ) -> Normed:
        """Add the product to the residual stream, in place; return what the next norm takes, arranged as by `gated`."""
        rows, stream = _rows(weight), residual.stream
        out, product = self._output(weight, x, rows, stream.device)
        num_squares = self._planned(weight, len(x)).num_squares(rows)
        squares = stream.new_empty((len(x), num_squares), dtype=torch.float32)
        product.bias, product.epilogue = _at(bias), RESIDUAL
        product.residual, product.next_norm = _at(stream), _at(residual.next_norm)
        product.squares_out, product.num_squares_out = _at(squares), num_squares
        self._run(weight, x, product)
        return Normed(out, squares, eps)

    def begun(self, x: torch.Tensor, norm: torch.Tensor, eps: float, first: Weight) -> Normed:
        """A residual stream [T, K] before its first norm, for a product with `first`."""
        squares = x.new_empty((len(x), 1), dtype=torch.float32)
        out, product = self._output(first, x, x.shape[1], x.device)
        sizes = len(x), x.shape[1], product.arranged
        call(self.library, "forebay_begin", x.device, _at(x), _at(norm), *sizes, product.out, _at(squares))
        return Normed(out, squares, eps)

    def arranged(self, x: torch.Tensor, weight: Weight) -> Activations:
        """x [T, K] as a product with `weight` takes it, T being at most 64."""
        plan = self._planned(weight, len(x))
        if not plan.is_wide:
            return x
        found = _room(len(x), x.shape[1], plan, x.device)
        call(self.library, "forebay_arrange", x.device, _at(x), *x.shape, 8 * plan.eights, _at(found.values))
        return found

    def dequantized(self, weight: Weight, out: torch.Tensor | None = None) -> torch.Tensor:
        """bf16 [N, K], rows in their old order; a packed one's into `out`, if that is given."""
        if isinstance(weight, torch.Tensor):
            return weight
        if out is None:
            out = torch.empty(weight.num_rows, weight.num_columns, dtype=torch.bfloat16, device=weight.codes.device)
        product = Product(out=_at(out), epilogue=GATED if weight.gated else PLAIN)
        call(self.library, "forebay_dequantize", out.device, ctypes.byref(_weighed(weight, product)))
        return out

    def stays_packed(self, weight: Weight, num_tokens: int) -> bool:
        """Whether a product of so many tokens takes a packed matrix as it is."""
        passes = MAX_PASSES if self._planned(weight, MAX_TOKENS).is_wide else 1
        return num_tokens <= passes * MAX_TOKENS

    def _many(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None) -> torch.Tensor:
        """As `linear`, of more tokens than the kernels take at once."""
        if not self.stays_packed(weight, len(x)):
            return F.linear(x, self.dequantized(weight), bias)
        out = x.new_empty(len(x), _rows(weight))
        for part, into in zip(x.split(MAX_TOKENS), out.split(MAX_TOKENS), strict=True):
            self._run(weight, part, Product(bias=_at(bias), out=_at(into), epilogue=PLAIN))
        return out

    def _planned(self, weight: Weight, num_tokens: int) -> Plan:
        columns = weight.num_columns if isinstance(weight, PackedWeight) else weight.shape[1]
        return self._plan(isinstance(weight, PackedWeight), num_tokens, _rows(weight), columns)

    def _output(
        self, weight: Weight, x: Activations, columns: int, device: torch.device
    ) -> tuple[Activations, Product]:
        """Room for activations [T, columns] beside a product with `weight`, arranged if that is a wide one."""
        plan = self._planned(weight, len(x))
        if not plan.is_wide:
            out = torch.empty(len(x), columns, dtype=torch.bfloat16, device=device)
            return out, Product(out=_at(out))
        arranged = _room(len(x), columns, plan, device)
        return arranged, Product(out=_at(arranged.values), arranged=8 * plan.eights)

    def _run(self, weight: Weight, x: Activations, product: Product) -> None:
        plan = self._planned(weight, len(x))
        if isinstance(x, Arranged) and not plan.is_wide:
            x = x.plain()
        elif isinstance(x, torch.Tensor):
            x = self.arranged(x, weight)
        given = x.values if isinstance(x, Arranged) else x
        _weighed(weight, product)
        if isinstance(weight, PackedWeight) and weight.gated and product.epilogue == PLAIN:
            product.epilogue = SPLIT  # rows come in their old order
        product.x, product.num_tokens = _at(given), len(x)
        product.warps_rows, product.cluster = plan.warps_rows, plan.cluster
        if plan.is_wide:
            call(self.library, "forebay_product_wide", given.device, ctypes.byref(product), plan.eights)
            return
        sizes = int(isinstance(weight, PackedWeight)), plan.eights, plan.row_tiles
        call(self.library, "forebay_product", given.device, ctypes.byref(product), *sizes)


def suits(weight: Weight) -> bool:
    """Whether the kernels can read a matrix: packed ones always, others if they are made up of whole tiles."""
    return isinstance(weight, PackedWeight) or not (weight.shape[0] % ROWS or weight.shape[1] % DENSE_STEP)


def load(path: Path) -> ctypes.CDLL:
    """The library that `build.cuda_library` makes: what a GPU has no use for is not in it."""
    product = ctypes.POINTER(Product)
    signatures = {
        "forebay_product": (product, Int, Int, Int, Pointer),
        "forebay_product_wide": (product, Int, Pointer),
        "forebay_arrange": (Pointer, Int, Int, Int, Pointer, Pointer),
        "forebay_dequantize": (product, Pointer),
        "forebay_begin": (Pointer, Pointer, Int, Int, Int, Pointer, Pointer, Pointer),
    }
    return opened(path, signatures)


def _planned(library: ctypes.CDLL) -> Planned:
    obstacle = None if hasattr(library, "forebay_product_wide") else "the GPU's compute capability is not 9.0"
    return choose(
        (Candidate("wide product", obstacle, planned_wide), Candidate("product", None, planned)), "auto"
    ).built


def _room(num_tokens: int, columns: int, plan: Plan, device: torch.device) -> Arranged:
    make = torch.empty if columns % CHUNK == 0 else torch.zeros
    chunks = -(-columns // CHUNK) * (CHUNK // ARRANGED_COLUMNS)
    values = make(chunks, 8 * plan.eights, ARRANGED_COLUMNS, dtype=torch.bfloat16, device=device)
    return Arranged(values, num_tokens, columns)


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
