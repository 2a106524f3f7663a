"""Cached state in FP8, the twin of what fused kernels write and read (the forms: `shared.engine.kv.formats`)."""

import torch
import torch.nn.functional as F

from shared.engine.kv.formats import GROUP, SCALE_BYTES

E4M3_MAX = 448.0
AMAX_MIN = 1e-4


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """2^ceil(log2(max(amax, 1e-4) / 448)): the power of two that brings `amax` into e4m3. float32, of amax's shape."""
    mantissa, exponent = torch.frexp(amax.float().clamp_min(AMAX_MIN) / E4M3_MAX)  # mantissa in [0.5, 1): exact
    return torch.ldexp(torch.ones_like(mantissa), exponent - (mantissa == 0.5).int())


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., D], any float, in one group -> e4m3 [..., D] and its scale float32 [...].

    An element differs from x by at most the larger of |x| / 16 and scale / 1024.
    """
    x = x.float()
    scale = scale_of(x.abs().amax(-1))
    return (x / scale[..., None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def dequantize(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """float32 [..., D] from e4m3 [..., D] and float32 [...]."""
    return values.float() * scale[..., None]


def pack_latents(latents: torch.Tensor, kv_lora_rank: int) -> torch.Tensor:
    """latents [T, kv_lora + rope] -> uint8 [T, bytes]."""
    groups = -(-kv_lora_rank // GROUP)
    padded = F.pad(latents[:, :kv_lora_rank].float(), (0, groups * GROUP - kv_lora_rank))
    values, scales = quantize(padded.unflatten(1, (groups, GROUP)))
    rope = latents[:, kv_lora_rank:].to(torch.bfloat16)
    values = values.flatten(1)[:, :kv_lora_rank]
    return torch.cat([part.contiguous().view(torch.uint8) for part in (values, scales, rope)], dim=1)


def unpack_latents(rows: torch.Tensor, kv_lora_rank: int) -> torch.Tensor:
    """float32 [..., kv_lora + rope] from uint8 [..., bytes]."""
    groups = -(-kv_lora_rank // GROUP)
    rope_at = kv_lora_rank + groups * SCALE_BYTES
    values = rows[..., :kv_lora_rank].view(torch.float8_e4m3fn).float()
    scales = rows[..., kv_lora_rank:rope_at].contiguous().view(torch.float32)
    values *= scales.repeat_interleave(GROUP, dim=-1)[..., :kv_lora_rank]
    return torch.cat((values, rows[..., rope_at:].contiguous().view(torch.bfloat16).float()), dim=-1)
