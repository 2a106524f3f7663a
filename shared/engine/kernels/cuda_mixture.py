"""A mixture of experts of few tokens in one CUDA kernel, `cuda/mixture.cuh`: from the residual's sum to the experts'.

The twins are what a layer computes without it: `gluon_rows.linear_keeping`, `triton_route.route` and
`gluon_experts.mixture`.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch

from shared.engine.kernels.experts import Experts, SharedExpert

Pointer, Int = ctypes.c_void_p, ctypes.c_int
MAX_TOKENS = 8
INNER, MAX_EXPERTS, MAX_CHOSEN = 256, 256, 8
HIDDEN = (2048, 6144)  # what it is compiled for
BLOCKS = 128  # divides what there is to share out; more multiprocessors gain nothing
MEETINGS = 2


class Mixture(ctypes.Structure):
    """As mixture.cuh has it."""

    _fields_ = (
        *((name, Pointer) for name in ("x", "delta", "gain", "router", "bias")),
        *((name, Pointer) for name in ("gate_up", "gate_up_scale", "down", "down_scale", "factors")),
        *((name, Pointer) for name in ("shared_gate_up", "shared_down")),
        *((name, Pointer) for name in ("total", "logits", "inner", "out", "arrivals")),
        *((name, Int) for name in ("num_tokens", "num_experts", "num_chosen", "normalize")),
        ("eps", ctypes.c_float),
        ("factor", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens choose: router [E, hidden] and `bias` float32 [E]; how many, and what their weights are made of."""

    router: torch.Tensor
    bias: torch.Tensor
    num_chosen: int
    factor: float
    normalize: bool


class CudaMixtures:
    """Computes them on one device, one after the other: its counters of arrivals are for one stream."""

    def __init__(self, library: ctypes.CDLL, device: torch.device, num_blocks: int, most_shared: int) -> None:
        """Of `num_blocks`, at most the multiprocessors there are, with `most_shared` bytes of shared memory each."""
        self.max_tokens = MAX_TOKENS
        self._library, self._num_blocks, self._most_shared = library, num_blocks, most_shared
        self._arrivals = torch.zeros(MEETINGS, dtype=torch.int64, device=device)

    def __call__(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        gain: torch.Tensor,
        eps: float,
        routing: Routing,
        experts: Experts,
        shared: SharedExpert,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta, and the mixture of its norm; all bfloat16 [T, hidden]."""
        assert experts.gate_up_scale is not None
        assert experts.down_scale is not None
        assert experts.factors is not None
        (num_tokens, hidden), num_experts = x.shape, len(routing.bias)
        total, out = torch.empty_like(x), torch.empty_like(x)
        logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
        inner = x.new_empty(num_tokens, routing.num_chosen + 1, INNER)
        tensors = (
            x.contiguous(), delta.contiguous(), gain, routing.router, routing.bias,
            experts.gate_up, experts.gate_up_scale, experts.down, experts.down_scale, experts.factors,
            shared.gate_up, shared.down, total, logits, inner, out, self._arrivals,
        )  # fmt: skip
        sizes = num_tokens, num_experts, routing.num_chosen, int(routing.normalize)
        arguments = Mixture(*(tensor.data_ptr() for tensor in tensors), *sizes, eps, routing.factor)
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        error = self._library.forebay_mixture(
            ctypes.byref(arguments), hidden, self._num_blocks, self._most_shared, stream
        )
        if error:
            raise RuntimeError(f"forebay_mixture: {self._library.forebay_error(error).decode()}")
        return total, out


def suits(routing: Routing, experts: Experts, shared: SharedExpert) -> bool:
    """Whether the kernel is made for such a mixture."""
    return (
        experts.factors is not None
        and experts.inner == INNER
        and shared.down.shape == (experts.down.shape[1], INNER)
        and shared.down.shape[0] in HIDDEN
        and len(routing.bias) <= MAX_EXPERTS
        and routing.num_chosen <= min(MAX_CHOSEN, len(routing.bias))
    )


def on(device: torch.device, library: ctypes.CDLL) -> CudaMixtures:
    """For a GPU."""
    found = torch.cuda.get_device_properties(device)
    return CudaMixtures(library, device, min(BLOCKS, found.multi_processor_count), found.shared_memory_per_block_optin)


def load(path: Path) -> ctypes.CDLL:
    """The library that `build.cuda_library` makes."""
    library = ctypes.CDLL(str(path))
    library.forebay_mixture.argtypes = (ctypes.POINTER(Mixture), Int, Int, Int, Pointer)
    library.forebay_error.argtypes, library.forebay_error.restype = (Int,), ctypes.c_char_p
    return library
