"""Products of few tokens with matrices in e4m3 by CUDA kernels of our own, `cuda/fp8.cu`, norm and all.

Twins: `w8a16.unpack` with `reference.rms_norm` and `F.linear`, and `sparse_reference` for what is left in pages.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.engine.kernels import w8a16
from shared.engine.kernels.cuda_call import call, opened
from shared.engine.kernels.inputs import Norm, Rows, State
from shared.engine.kernels.w8a16 import Weight

TALL = 16_384  # rows that fill a GPU with blocks of their own
Pointer, Int, Float = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
MAX_ROWS = 32  # more read a matrix in bfloat16, made anew for them
SHORT, LONG = 2048, 4096  # columns
FULL, WIDE = 3000, 7000  # rows up to which clusters of eight blocks leave none without a place, and clusters of four


class Product(ctypes.Structure):
    """As fp8.cu has it."""

    _fields_ = (
        *((name, Pointer) for name in ("codes", "scales", "others", "x", "delta", "gain", "out", "total")),
        *((name, Int) for name in ("num_tokens", "num_rows", "num_others", "num_columns", "x_stride", "delta_stride")),
        *((name, Int) for name in ("wide_x", "wide_out", "cluster")),
        ("eps", Float),
    )


class Kept(ctypes.Structure):
    """As fp8.cu has it."""

    _fields_ = (
        *((name, Pointer) for name in ("cos", "sin", "slots", "latent_gain", "key_gain", "key_bias")),
        *((name, Pointer) for name in ("latents", "keys")),
        *((name, ctypes.c_int64) for name in ("latent_page", "key_page")),
        *((name, Int) for name in ("latent", "half", "key", "page_size")),
        *((name, Float) for name in ("latent_eps", "key_eps")),
    )


@dataclass(frozen=True, slots=True)
class Cut:
    """How a product is cut up: blocks that share out columns (a cluster), and how many steps of 128 columns each warp
    has asked for at once."""

    cluster: int
    depth: int


class CudaFp8:
    """Multiplies matrices in e4m3. With `pdl` kernels start before those in front of them have ended."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def linear(
        self,
        x: torch.Tensor,
        weight: Weight,
        norm: Norm | None = None,
        dtype: torch.dtype = torch.float32,
        *,
        cut: Cut | None = None,
        pdl: bool = True,
    ) -> torch.Tensor:
        """x bfloat16 or float32 [T, K], behind `norm` or as it is, times weight' [N, K] -> [T, N], bfloat16 or float32.

        A float32 x is rounded to bfloat16 first. Rows of x and of what is added to it may be strided.
        """
        product, out = self._product(x, weight, norm, dtype)
        self._launch(product, None, out, cut or plan(*weight.shape, len(x)), pdl=pdl)
        return out

    def linear_keeping(
        self, x: torch.Tensor, weight: Weight, norm: Norm, *, cut: Cut | None = None, pdl: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `linear`, to float32; also the sum that was normed (the residual), bfloat16 [T, K]."""
        product, out = self._product(x, weight, norm, torch.float32)
        total = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
        product.total = total.data_ptr()
        self._launch(product, None, out, cut or plan(*weight.shape, len(x)), pdl=pdl)
        return out, total

    def queries_and_state(
        self,
        low: torch.Tensor,
        weight: Weight,
        norm: Norm,
        rows: Rows,
        state: State,
        *,
        cut: Cut | None = None,
        pdl: bool = True,
    ) -> torch.Tensor:
        """As `gluon_state.queries_and_state`; low float32."""
        product, out = self._product(low, weight, norm, torch.float32)
        keys, key_norm, latents = state.keys, state.key_norm, state.latents
        full = keys is not None and key_norm is not None
        half = rows.cos.shape[1]
        kept = Kept(
            rows.cos.data_ptr(), rows.sin.data_ptr(), rows.own_slots.data_ptr(), state.latent_gain.data_ptr(),
            _at(key_norm.gain if key_norm else None), _at(key_norm.bias if key_norm else None),
            latents.data_ptr(), _at(keys), latents.stride(0), keys.stride(0) if keys is not None else 0,
            latents.shape[2] - 2 * half, half, keys.shape[2] if keys is not None and full else 0, latents.shape[1],
            state.latent_eps, key_norm.eps if key_norm else 0.0,
        )  # fmt: skip
        self._launch(product, kept, out, cut or plan(*weight.shape, len(low)), pdl=pdl)
        return out

    def plain(self, weight: Weight, *, pdl: bool = True) -> torch.Tensor:
        """The matrix in bfloat16, for products with many rows."""
        num_rows, num_columns = weight.num_rows, weight.shape[1]
        out = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.codes.device)
        product = Product(weight.codes.data_ptr(), weight.scales.data_ptr(), out=out.data_ptr())
        product.num_rows, product.num_columns = num_rows, num_columns
        call(self._library, "forebay_fp8_dequantize", out.device, ctypes.byref(product), int(pdl))
        out[num_rows:] = weight.others
        return out

    def _product(
        self, x: torch.Tensor, weight: Weight, norm: Norm | None, dtype: torch.dtype
    ) -> tuple[Product, torch.Tensor]:
        num_rows, num_columns = weight.shape
        out = torch.empty(len(x), num_rows, dtype=dtype, device=x.device)
        delta = norm.delta if norm else None
        product = Product(
            weight.codes.data_ptr(), weight.scales.data_ptr(), weight.others.data_ptr(), x.data_ptr(), _at(delta),
            norm.gain.data_ptr() if norm else None, out.data_ptr(), None,
            len(x), weight.num_rows, len(weight.others), num_columns, x.stride(0),
            delta.stride(0) if delta is not None else 0, int(x.dtype == torch.float32), int(dtype == torch.float32),
            eps=norm.eps if norm else 0.0,
        )  # fmt: skip
        return product, out

    def _launch(self, product: Product, kept: Kept | None, out: torch.Tensor, cut: Cut, *, pdl: bool) -> None:
        pages = ctypes.byref(kept) if kept else None
        product.cluster = cut.cluster
        call(self._library, "forebay_fp8_product", out.device, ctypes.byref(product), pages, cut.depth, int(pdl))


@dataclass(frozen=True, slots=True)
class Fp8Matrix:
    """A matrix in e4m3, and who multiplies it."""

    weight: Weight
    kernels: CudaFp8

    @property
    def nbytes(self) -> int:
        """What reading it takes."""
        return self.weight.nbytes

    def first(self, num_rows: int) -> "Fp8Matrix":
        """So many rows of it; see `Weight.first`."""
        return Fp8Matrix(self.weight.first(num_rows), self.kernels)


def plan(num_rows: int, num_columns: int, num_tokens: int) -> Cut:
    """The cut that was fastest (docs/LOG.md): a warp asks at once for most of what it reads, as far as all blocks then
    find a place at once. More registers go to more tokens, and fewer blocks do."""
    if num_rows > TALL:
        return _cut(num_columns, 2, 3)
    if num_columns > LONG:
        return _cut(num_columns, 8, 4 if num_tokens <= 4 and num_rows <= FULL else 3)
    if num_rows <= FULL:
        return _cut(num_columns, 8, 3)
    if num_tokens == 1 and num_columns > SHORT:
        return _cut(num_columns, 4, 4)
    if num_tokens in (3, 4) and num_rows > WIDE:
        return _cut(num_columns, 2, 4)
    by_four = num_tokens in (3, 4) or (num_tokens == 2 and num_rows <= WIDE) or (num_tokens == 1 and num_rows > WIDE)
    return _cut(num_columns, 4, 3) if by_four else _cut(num_columns, 2, 6)


def _cut(num_columns: int, cluster: int, depth: int) -> Cut:
    """With the largest cluster up to that one which has whole steps for each block."""
    steps = num_columns // w8a16.COLUMNS
    return Cut(next(size for size in (8, 4, 2, 1) if size <= cluster and steps % size == 0), depth)


def load(path: Path) -> ctypes.CDLL:
    """The library that `build.cuda_library` makes."""
    product = ctypes.POINTER(Product)
    signatures = {
        "forebay_fp8_product": (product, ctypes.POINTER(Kept), Int, Int, Pointer),
        "forebay_fp8_dequantize": (product, Int, Pointer),
    }
    return opened(path, signatures)


def _at(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
