"""NVFP4: 4-bit floats (e2m1), an e4m3 scale for every 16 along a row, a float32 scale for the matrix.

The arithmetic is NVIDIA ModelOpt's (`NVFP4QTensor`, version 0.47), bit for bit; tests hold it to its output.
"""

from dataclasses import dataclass

import torch

from shared.engine.quantization.formats import Format

GROUP = 16
CODE_MAX, SCALE_MAX, SCALE_MIN = 6.0, 448.0, 2.0**-9
# Magnitudes by code 0..7; bit 3 of a code is the sign. A value rounds up when it passes the bound between two of them.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
# Elements worked on at a time, so that float32 intermediates stay small beside a large matrix.
CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True, slots=True)
class Nvfp4Tensor:
    """w[n, k] = value(code[n, k]) * scale[n, k // 16] * scale_2.

    codes [N, K/2] uint8, even k in the low nibble; scale [N, K/16] float8_e4m3fn; scale_2 [] float32.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    scale_2: torch.Tensor


def from_stored(format_: Format, codes: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> Nvfp4Tensor:
    """The three tensors of an NVFP4 `format_`, in the order of its suffixes; its global scale becomes a factor."""
    factor = factor.float().reshape(())
    return Nvfp4Tensor(codes, scale, 1.0 / factor if format_ is Format.NVFP4_RECIPROCAL else factor)


def matrix_scale(*weights: torch.Tensor) -> torch.Tensor:
    """amax / (6 * 448), [] float32: the `weight_scale_2` that these matrices share when they are computed as one.

    All zeros give 1 / (6 * 448) (ModelOpt's formula would give NaN scales).
    """
    amax = torch.stack([weight.abs().amax().float() for weight in weights]).amax()
    return torch.where(amax == 0, torch.ones_like(amax), amax) / (CODE_MAX * SCALE_MAX)


def quantize(weight: torch.Tensor, scale_2: torch.Tensor | None = None) -> Nvfp4Tensor:
    """Quantize weight [N, K], K a multiple of 16, any float dtype. Raises ValueError for another K."""
    if weight.shape[-1] % GROUP:
        raise ValueError(f"NVFP4 needs rows of a multiple of {GROUP} elements, not {weight.shape[-1]}")
    scale_2 = matrix_scale(weight) if scale_2 is None else scale_2
    rows = max(1, CHUNK_ELEMENTS // weight.shape[-1])
    parts = [_quantize_rows(part, scale_2) for part in torch.split(weight, rows)]
    return Nvfp4Tensor(torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts]), scale_2)


def dequantize(tensor: Nvfp4Tensor, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """[N, K]; the products are computed in float32 and rounded once."""
    values = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), device=tensor.codes.device)[unpack(tensor.codes)]
    scale = tensor.scale.float() * tensor.scale_2
    grouped = values.view(*scale.shape, GROUP) * scale[..., None]
    return grouped.flatten(-2).to(dtype)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """codes [N, K] (0..15) -> [N, K/2] uint8, even k in the low nibble."""
    codes = codes.to(torch.uint8)
    return (codes[..., 1::2] << 4) | codes[..., 0::2]


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """[N, K/2] uint8 -> codes [N, K] int32."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).int()


def _quantize_rows(weight: torch.Tensor, scale_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = weight.float().reshape(len(weight), -1, GROUP)
    scale = blocks.abs().amax(-1) / (CODE_MAX * scale_2)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale).clamp(SCALE_MIN, SCALE_MAX).to(torch.float8_e4m3fn)
    scaled = (blocks / (scale.float() * scale_2)[..., None]).flatten(-2)
    return pack(_round(scaled)), scale


def _round(scaled: torch.Tensor) -> torch.Tensor:
    """The code nearest to each element, ties to the even one, [N, K] uint8. Negative elements that round to zero keep
    their sign, as ModelOpt has it."""
    bounds = torch.tensor(BOUNDS, device=scaled.device)
    magnitude = scaled.abs()
    below = torch.bucketize(magnitude, bounds, out_int32=True)
    # Left of a bound a tie went to the lower code; it belongs to the upper one where that is even.
    tie_up = torch.isin(magnitude, bounds[1::2])
    return (below + tie_up.int() + 8 * (scaled < 0).int()).to(torch.uint8)
