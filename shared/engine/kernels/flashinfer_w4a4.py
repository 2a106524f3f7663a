"""NVFP4 activations times NVFP4 weights on GPUs of compute capability 10.x (B200, B300), by FlashInfer's CUTLASS
kernels. **Compiled for sm_100a and held to FlashInfer's signatures and layouts, not run: no such GPU was at hand.** So
`quantization.w4a4_proof` runs small products on the GPU that is to serve, and only if they are right may these do so.

FlashInfer has several backends for each. CUTLASS' are compiled by nvcc at first use, from sources in the package;
trtllm-gen's are fetched from the network when they are first needed, which a server must not depend on. Programmatic
dependent launch is left off: which kernels in front may still be writing (decisions/0023) has to be tried on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from shared.engine.kernels.w4a4 import Experts, Weight

CAPABILITY = 10  # major; 12.x has other tensor cores, and kernels of its own
WITH_OWN_KERNELS = 3  # minor; the others share theirs
BACKEND = "cutlass"


@dataclass(frozen=True, slots=True)
class Functions:
    """FlashInfer's `fp4_quantize`, `mm_fp4` and `cutlass_fused_moe`, or doubles of them."""

    quantize: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    multiply: Callable[..., torch.Tensor]
    mixture: Callable[..., torch.Tensor]


class FlashInferProducts:
    """Satisfies `w4a4.Products`."""

    def __init__(self, functions: Functions) -> None:
        self._functions = functions

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As Products."""
        codes, scales = self._functions.quantize(x, weight.encode, enable_pdl=False)
        out = self._functions.multiply(
            codes, weight.codes.T, scales, weight.scales.T, weight.alpha, out_dtype=x.dtype, backend=BACKEND
        )
        return out if bias is None else out + bias

    def experts(self, x: torch.Tensor, experts: Experts, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As Products. Sixteen codes are passed as an int64, and four scales as an int32; activations are quantized
        within, by each expert's scale. Sums over experts are taken in the order of the choice: the fused ones depend on
        which block ends first, and tokens would on the run."""
        return self._functions.mixture(
            x,
            chosen,
            weights,
            experts.up_gate.view(torch.int64),
            experts.down.view(torch.int64),
            x.dtype,
            quant_scales=[
                experts.up_gate_encode,
                experts.up_gate_scales.view(torch.int32),
                experts.up_gate_alpha,
                experts.down_encode,
                experts.down_scales.view(torch.int32),
                experts.down_alpha,
            ],
            use_fused_finalize=False,
            enable_pdl=False,
        )


def load() -> FlashInferProducts:
    """By the installed FlashInfer. Raises ImportError."""
    from flashinfer import fp4_quantize, mm_fp4
    from flashinfer.fused_moe import cutlass_fused_moe

    return FlashInferProducts(Functions(fp4_quantize, mm_fp4, cutlass_fused_moe))


def mixtures_are_compiled(capability: tuple[int, int]) -> bool:
    """Whether FlashInfer has its fused mixture for such GPUs ready: its 270 sources take hours of a core."""
    from flashinfer.jit import fused_moe

    generate = fused_moe.gen_cutlass_fused_moe_sm103_module
    if capability[1] != WITH_OWN_KERNELS:
        generate = fused_moe.gen_cutlass_fused_moe_sm100_module
    return bool(generate().is_compiled)


def capability_obstacle(capability: tuple[int, int]) -> str | None:
    """Why a GPU of this compute capability has no such kernels, if it has none."""
    if capability[0] == CAPABILITY:
        return None
    return f"they need compute capability {CAPABILITY}.x, and this GPU has {capability[0]}.{capability[1]}"
