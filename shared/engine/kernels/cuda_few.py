"""A mixture of NVFP4 experts of a few tokens by one CUDA kernel, `cuda/few.cuh`, from the router's logits on.

The twin is `layers.moe.Moe`; `gluon_experts` computes the same in three kernels.
"""

import ctypes
from pathlib import Path

import torch

from shared.engine.kernels import cuda_experts
from shared.engine.kernels.cuda_call import call, opened
from shared.engine.kernels.experts import Experts, SharedExpert

Pointer, Int = ctypes.c_void_p, ctypes.c_int
MAX_TOKENS, CHOSEN = 4, cuda_experts.MAX_CHOSEN
HIDDEN = (2048, 6144)
NUM_BLOCKS = 128  # all of them at once
INNER = (256, 512)
BATCHES = 3  # in the ring (docs/LOG.md)


class Scoring(ctypes.Structure):
    """As chosen.cuh has it."""

    _fields_ = (*((name, Int) for name in ("num_experts", "num_chosen", "normalize")), ("factor", ctypes.c_float))


class Arguments(ctypes.Structure):
    """`Few` of few.cuh."""

    _fields_ = (
        *((name, Pointer) for name in ("x", "logits", "bias", "gate_up", "gate_up_scale", "down", "down_scale")),
        *((name, Pointer) for name in ("factors", "shared_gate_up", "shared_down", "state", "out")),
        ("scoring", Scoring),
        *((name, Int) for name in ("num_tokens", "hidden", "inner", "row_stride", "num_batches")),
    )


class CudaFew:
    """Computes mixtures of a device, one at a time: they share what blocks tell one another."""

    def __init__(self, library: ctypes.CDLL, device: torch.device) -> None:
        self._library = library
        words = {inner: MAX_TOKENS * (CHOSEN + 1) * inner // 2 for inner in INNER}
        self._states = {inner: torch.full((4 + 2 * n,), -1, dtype=torch.int32, device=device)
                        for inner, n in words.items()}  # fmt: skip

    def __call__(
        self,
        x: torch.Tensor,
        logits: torch.Tensor,
        bias: torch.Tensor,
        factor: float,
        experts: Experts,
        shared: SharedExpert,
        *,
        normalize: bool,
        pdl: bool = True,
    ) -> torch.Tensor:
        """The weighted sum of eight chosen experts and the shared one, bfloat16 [T, hidden].

        x fp16 [T, hidden]; logits float32 [T, E], whose rows may be strided; bias float32 [E].
        """
        assert experts.gate_up_scale is not None
        assert experts.down_scale is not None
        assert experts.factors is not None
        num_tokens, hidden = x.shape
        out = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=x.device)
        parts = (
            x, logits, bias, experts.gate_up, experts.gate_up_scale, experts.down, experts.down_scale, experts.factors,
            shared.gate_up, shared.down, self._states[experts.inner], out,
        )  # fmt: skip
        scoring = Scoring(len(bias), CHOSEN, int(normalize), factor)
        sizes = num_tokens, hidden, experts.inner, logits.stride(0), BATCHES
        arguments = Arguments(*(part.data_ptr() for part in parts), scoring, *sizes)
        call(self._library, "forebay_few", x.device, ctypes.byref(arguments), int(pdl))
        return out


def suits(experts: Experts, shared: SharedExpert, top_k: int) -> bool:
    """Whether the kernel is made for such a mixture, and all its blocks find a place at once."""
    num_experts, hidden, _ = experts.down.shape
    return (
        experts.factors is not None
        and experts.inner in INNER
        and shared.down.shape == (hidden, experts.inner)
        and hidden in HIDDEN
        and num_experts <= cuda_experts.MAX_EXPERTS
        and top_k == CHOSEN
        and _num_processors(experts.down.device) >= NUM_BLOCKS
    )


def _num_processors(device: torch.device) -> int:
    """On the CPU, where blocks are emulated, as many as wanted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else NUM_BLOCKS


def load(path: Path) -> ctypes.CDLL:
    """The library that `build.cuda_library` makes of it."""
    return opened(path, {"forebay_few": (ctypes.POINTER(Arguments), Int, Pointer)})
