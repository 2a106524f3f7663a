"""Activations in NVFP4: how they are quantized, how weights are joined for them, and what `kernels.w4a4` computes, in
plain torch: the twin, and what serves where quality is to be judged without a GPU that multiplies FP4.

The arithmetic is that of FlashInfer's `cvt_warp_fp16_to_fp4` and of its own reference in torch (`ref_fp4_quant` in its
tests/test_helpers/utils_fp4.py). The kernel's reciprocals are approximate, which can move an element that lies just
between two codes, and no other. It is not that of weights: scales have no least value, so groups of tiny elements
become zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shared.engine.kernels import w4a4
from shared.engine.kernels.w4a4 import Experts, Weight
from shared.engine.quantization import nvfp4
from shared.engine.quantization.nvfp4 import CODE_MAX, GROUP, SCALE_MAX, Nvfp4Tensor

FLOAT_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A matrix with the scale of its inputs, [] float32 (`input_scale`): the largest is 6 * 448 times that."""

    weight: Nvfp4Tensor
    input_scale: torch.Tensor


def quantize(x: torch.Tensor, encode: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, K] of any float dtype, K a multiple of 16, with `encode` float32 [] or [1], 1 / its scale: codes uint8
    [T, K/2] and scales float8_e4m3fn [T, K/16]."""
    grouped = x.float().unflatten(-1, (-1, GROUP))
    amax = grouped.abs().amax(-1)
    scale = (encode * (amax * (1 / CODE_MAX))).clamp(max=SCALE_MAX).to(torch.float8_e4m3fn)
    factor = (1 / (scale.float() * (1 / encode))).clamp(max=FLOAT_MAX)
    factor = torch.where(amax > 0, factor, 0)
    return nvfp4.pack(nvfp4.rounded((grouped * factor[..., None]).flatten(-2))), scale


def values(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What both stand for, without the scale of the matrix: float32 [..., K], exact."""
    one = torch.ones((), device=codes.device)
    return nvfp4.dequantize(Nvfp4Tensor(codes, scale, one), torch.float32)


class Linear:
    """The twin of `Products.linear` for one matrix, kept as float32 values that its codes and scales stand for: 4 bytes
    an element. All that is rounded is the sum, which is in float32, and the result, in the dtype of x."""

    def __init__(self, weight: Weight, bias: torch.Tensor | None = None) -> None:
        num_rows, num_columns = weight.codes.shape[0], weight.codes.shape[1] * 2
        scales = w4a4.unswizzled(weight.scales, num_rows, num_columns // GROUP).view(torch.float8_e4m3fn)
        self._values, self._bias = values(weight.codes, scales), bias
        self._alpha, self._encode = weight.alpha, weight.encode

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, K] -> [T, N]."""
        product = F.linear(values(*quantize(x, self._encode)), self._values) * self._alpha
        rounded = product.to(x.dtype)
        return rounded if self._bias is None else rounded + self._bias


class TorchProducts:
    """The twin, on any device. What a weight stands for is computed anew each time: this is for tests."""

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As Products."""
        return Linear(weight, bias)(x)

    def experts(self, x: torch.Tensor, experts: Experts, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As Products: inner values and what goes into the sum are rounded to the dtype of x, the sum is in float32."""
        out = torch.zeros(len(x), experts.down.shape[1], device=x.device)
        for expert in chosen.unique().tolist():
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            up_gate, down = of_expert(experts, expert)
            up, gate = Linear(up_gate)(x[rows]).float().chunk(2, dim=-1)
            inner = (F.silu(gate) * up).to(x.dtype)
            out[rows] += Linear(down)(inner).float() * weights[rows, place, None]
        return out.to(x.dtype)


def of_expert(experts: Experts, expert: int) -> tuple[Weight, Weight]:
    """One expert's up and gate, and its down."""
    e = slice(expert, expert + 1)
    return (
        Weight(
            experts.up_gate[expert],
            experts.up_gate_scales[expert],
            experts.up_gate_alpha[e],
            experts.up_gate_encode[e],
        ),
        Weight(experts.down[expert], experts.down_scales[expert], experts.down_alpha[e], experts.down_encode[e]),
    )


def joined(parts: Sequence[Calibrated]) -> Weight | None:
    """Matrices of one input as one, their rows one behind the other. The larger of two scales of their input holds.

    None if their own scales differ, or if the kernels do not divide what comes out.
    """
    first = parts[0].weight
    codes = torch.cat([part.weight.codes for part in parts])
    if any(not torch.equal(part.weight.scale_2, first.scale_2) for part in parts):
        return None
    if not w4a4.fits(len(codes), codes.shape[1] * 2):
        return None
    scale = torch.cat([part.weight.scale for part in parts]).view(torch.uint8)
    alpha, encode = _factors(first.scale_2, [part.input_scale for part in parts])
    return Weight(codes, w4a4.swizzled(scale), alpha, encode)


def stacked(up_gates: Sequence[Calibrated], downs: Sequence[Calibrated]) -> Experts | None:
    """Expert by expert: **up and then gate** joined [2 I, hidden], and down [hidden, I]. None if the kernels do not
    divide them."""
    hidden, half_inner = downs[0].weight.codes.shape
    if not w4a4.experts_fit(hidden, half_inner * 2):
        return None
    return Experts(*_stack(up_gates), *_stack(downs))


def _stack(parts: Sequence[Calibrated]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    factors = [_factors(part.weight.scale_2, [part.input_scale]) for part in parts]
    return (
        torch.stack([part.weight.codes for part in parts]),
        torch.stack([w4a4.swizzled(part.weight.scale.view(torch.uint8)) for part in parts]),
        torch.cat([alpha for alpha, _ in factors]),
        torch.cat([encode for _, encode in factors]),
    )


def _factors(scale_2: torch.Tensor, input_scales: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha and encode, float32 [1] each."""
    input_scale = torch.stack([scale.float().reshape(()) for scale in input_scales]).amax().to(scale_2.device)
    return (scale_2 * input_scale).reshape(1), (1 / input_scale).reshape(1)
