"""NVFP4: 4-bit floats (e2m1), an e4m3 scale for every 16 along a row, a float32 scale for the matrix.

The arithmetic is NVIDIA ModelOpt's (`NVFP4QTensor`, version 0.47), bit for bit; tests hold it to its output.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from shared.engine.quantization.formats import Format

GROUP = 16
CODE_MAX, SCALE_MAX, SCALE_MIN = 6.0, 448.0, 2.0**-9
# Magnitudes by code 0..7; bit 3 of a code is the sign.
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Elements worked on at a time: float32 intermediates stay small beside a large matrix, and in the processor's cache.
CHUNK_ELEMENTS = 1 << 18


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
    """The `weight_scale_2`, [] float32, that these matrices share when they are computed as one."""
    return scale_of(torch.stack([amax(weight) for weight in weights]).amax())


def amax(weight: torch.Tensor) -> torch.Tensor:
    """The largest magnitude, [] float32; NaN if there is one."""
    low, high = torch.aminmax(weight)  # several times as fast as abs().amax(), and without a copy
    return torch.maximum(-low, high).float()


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """amax / (6 * 448), of weights for `weight_scale_2` and of activations for `input_scale`.

    0 gives 1 / (6 * 448) (ModelOpt's formula would give NaN scales of a matrix of zeros).
    """
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
    pairs = codes.to(torch.uint8).contiguous().view(torch.int16)  # little-endian: the odd k is the high byte
    return (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """[N, K/2] uint8 -> codes [N, K] int32."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).int()


def _quantize_rows(weight: torch.Tensor, scale_2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weight = weight.float()
    amax = F.max_pool1d(weight.abs()[None], GROUP)[0]  # of what torch offers the fastest maximum over short runs
    scale = amax / (CODE_MAX * scale_2)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale).clamp(SCALE_MIN, SCALE_MAX).to(torch.float8_e4m3fn)
    scaled = weight.unflatten(-1, (-1, GROUP)) / (scale.float() * scale_2)[..., None]
    return pack(rounded(scaled.flatten(-2))), scale


def rounded(scaled: torch.Tensor) -> torch.Tensor:
    """The code nearest to each element, ties to the even one, [N, K] uint8. Negative elements that round to zero keep
    their sign, as ModelOpt has it.

    Codes lie on three lines, 2m below 2, m + 2 from there to 4 and m / 2 + 4 above, the lowest of which is the right
    one everywhere; what is even among codes is even on each of them, so rounding to integers does for ties.
    """
    m = scaled.abs().clamp_(max=CODE_MAX)
    code = torch.minimum((m * 2).round_(), m.round().add_(2))
    code = torch.minimum(code, m.mul_(0.5).round_().add_(4))
    return code.int().to(torch.uint8).add_(scaled < 0, alpha=8)
