"""What splits of a selection found, merged by a CUDA kernel, `cuda/latent.cu`. Twin: `triton_latent.merge`."""

import ctypes
from pathlib import Path

import torch

from shared.engine.kernels.cuda_call import call, opened
from shared.engine.kernels.splits import Parts

Pointer, Int = ctypes.c_void_p, ctypes.c_int
LATENT, VALUE, MAX_SPLITS = 512, 256, 64


class Merge(ctypes.Structure):
    """As latent.cu has it."""

    _fields_ = (
        *((name, Pointer) for name in ("parts", "maxima", "sums", "up_value", "out")),
        *((name, Int) for name in ("num_heads", "num_splits")),
    )


class CudaLatent:
    """Brings attention out of latent space."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def merge(self, parts: Parts, up_value: torch.Tensor, *, pdl: bool = True) -> torch.Tensor:
        """As `triton_latent.merge`: bfloat16 [T, H * v]. `up_value` bfloat16 [H, v, latent]."""
        num_tokens, heads, splits, _ = parts.means.shape
        out = up_value.new_empty(num_tokens, heads * VALUE)
        tensors = (parts.means, parts.maxima, parts.sums, up_value, out)
        arguments = Merge(*(tensor.data_ptr() for tensor in tensors), heads, splits)
        call(self._library, "forebay_merge", out.device, ctypes.byref(arguments), num_tokens, int(pdl))
        return out


def suits(up_value: torch.Tensor) -> bool:
    """Whether the kernel is made for such a matrix [H, v, latent]."""
    return up_value.shape[1:] == (VALUE, LATENT)


def load(path: Path) -> ctypes.CDLL:
    """The library that `build.cuda_library` makes."""
    return opened(path, {"forebay_merge": (ctypes.POINTER(Merge), Int, Int, Pointer)})
