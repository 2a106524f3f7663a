"""A mixture of NVFP4 experts of up to 64 tokens by CUDA kernels of our own, `cuda/experts.cu`.

Tokens of the same expert are grouped, an expert's weights are read once, and tensor cores multiply them. The twin is
`layers.moe.Moe`; `gluon_experts` computes the same choice by choice, faster for few tokens (docs/decisions/0043).
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.engine.kernels.cuda_call import call, opened
from shared.engine.kernels.experts import Experts, SharedExpert

Pointer, Int = ctypes.c_void_p, ctypes.c_int
MAX_TOKENS, MAX_EXPERTS, MAX_CHOSEN, INNER = 64, 256, 8, 256
HIDDEN = (1024, 2048, 6144)
MAX_MEMBERS = MAX_CHOSEN * MAX_TOKENS
GROUPS_WORDS = 1 + MAX_EXPERTS + MAX_EXPERTS + 1 + 2 * MAX_MEMBERS
TILES = 2  # of an expert, of a block


class Routing(ctypes.Structure):
    """As experts.cuh has it."""

    _fields_ = (
        *((name, Pointer) for name in ("logits", "bias", "groups")),
        *((name, Int) for name in ("num_tokens", "num_experts", "num_chosen", "row_stride", "normalize")),
        ("factor", ctypes.c_float),
    )


class Arguments(ctypes.Structure):
    """`Experts` of experts.cuh."""

    _fields_ = (
        *((name, Pointer) for name in ("x", "gate_up", "gate_up_scale", "down", "down_scale", "factors")),
        *((name, Pointer) for name in ("shared_gate_up", "shared_down", "groups", "inner", "shared_inner", "out")),
        *((name, Int) for name in ("num_tokens", "hidden", "tiles_each")),
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """Which experts compute which tokens with what weights: `Groups` of experts.cuh as int32. At most `most` groups."""

    groups: torch.Tensor
    most: int


class CudaExperts:
    """Computes mixtures. With `pdl` kernels start before those in front of them have ended."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor, top_k: int, factor: float, *, normalize: bool, pdl: bool = True
    ) -> Choice:
        """As `triton_route.route`: logits float32 [T, E], whose rows may be strided, bias float32 [E]."""
        num_tokens, num_experts = len(logits), len(bias)
        groups = torch.empty(GROUPS_WORDS, dtype=torch.int32, device=logits.device)
        parts = (logits, bias, groups)
        sizes = num_tokens, num_experts, top_k, logits.stride(0), int(normalize)
        arguments = Routing(*(part.data_ptr() for part in parts), *sizes, factor)
        call(self._library, "forebay_route", logits.device, ctypes.byref(arguments), int(pdl))
        return Choice(groups, min(num_tokens * top_k, num_experts))

    def __call__(
        self, x: torch.Tensor, choice: Choice, experts: Experts, shared: SharedExpert, *, pdl: bool = True
    ) -> torch.Tensor:
        """The weighted sum of the chosen experts and the shared one, bfloat16 [T, hidden]; x fp16 [T, hidden]."""
        assert experts.gate_up_scale is not None
        assert experts.down_scale is not None
        assert experts.factors is not None
        num_tokens, hidden = x.shape
        inner = torch.empty(MAX_CHOSEN * num_tokens, INNER, dtype=torch.float16, device=x.device)
        shared_inner = torch.empty(num_tokens, INNER, dtype=torch.bfloat16, device=x.device)
        out = torch.empty(num_tokens, hidden, dtype=torch.bfloat16, device=x.device)
        parts = (
            x, experts.gate_up, experts.gate_up_scale, experts.down, experts.down_scale, experts.factors,
            shared.gate_up, shared.down, choice.groups, inner, shared_inner, out,
        )  # fmt: skip
        arguments = Arguments(*(part.data_ptr() for part in parts), num_tokens, hidden, TILES)
        call(self._library, "forebay_experts", x.device, ctypes.byref(arguments), choice.most, int(pdl))
        return out


def suits(experts: Experts, shared: SharedExpert, top_k: int) -> bool:
    """Whether the kernels are made for such a mixture."""
    num_experts, hidden, _ = experts.down.shape
    return (
        experts.factors is not None
        and experts.inner == INNER
        and shared.down.shape == (hidden, INNER)
        and hidden in HIDDEN
        and num_experts <= MAX_EXPERTS
        and top_k <= MAX_CHOSEN
    )


def load(path: Path) -> ctypes.CDLL:
    """The library that `build.cuda_library` makes of them."""
    routing, arguments = ctypes.POINTER(Routing), ctypes.POINTER(Arguments)
    return opened(path, {"forebay_route": (routing, Int, Pointer), "forebay_experts": (arguments, Int, Int, Pointer)})
