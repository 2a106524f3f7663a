"""How CUDA kernels of our own are called."""

import ctypes

import torch


def call(library: ctypes.CDLL, name: str, device: torch.device, *arguments: object) -> None:
    """Launch what `library` has as `name` behind all that was launched on a device; on the CPU it is an emulation.
    Raises RuntimeError if it is refused."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    if error := getattr(library, name)(*arguments, ctypes.c_void_p(stream)):
        raise RuntimeError(f"{name}: {library.forebay_error(error).decode()}")
