"""How CUDA kernels of our own are loaded and called."""

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def opened(path: Path, signatures: Mapping[str, tuple[Any, ...]]) -> ctypes.CDLL:
    """A library that `build.cuda_library` makes, whose functions take what `signatures` says. Not all need be in it:
    what a GPU has no use for is left out."""
    library = ctypes.CDLL(str(path))
    for name, types in signatures.items():
        if hasattr(library, name):
            getattr(library, name).argtypes = types
    if hasattr(library, "forebay_error"):  # a single source of several lacks it
        library.forebay_error.argtypes, library.forebay_error.restype = (ctypes.c_int,), ctypes.c_char_p
    return library


def call(library: ctypes.CDLL, name: str, device: torch.device, *arguments: object) -> None:
    """Launch what `library` has as `name` behind all that was launched on a device; on the CPU it is an emulation.
    Raises RuntimeError if it is refused."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if error := getattr(library, name)(*arguments, ctypes.c_void_p(stream)):
        raise RuntimeError(f"{name}: {library.forebay_error(error).decode()}")
