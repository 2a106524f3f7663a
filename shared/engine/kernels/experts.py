"""How experts are laid out for the kernels of `gluon_experts`, and back."""

from dataclasses import dataclass

import torch

FACTOR = 2.0**8  # the bits of a scale (e4m3) as those of an fp16 are its value / FACTOR
GROUP = 16  # elements that share a scale
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 of a code is the sign


@dataclass(frozen=True, slots=True)
class Experts:
    """E experts' gate and up joined [E, 2 I, hidden], and down [E, hidden, I]. Without scales these are bfloat16.

    With scales they are codes in words of eight, as uint8: word j of a row of K holds elements 4 j to 4 j + 3 and the
    four that are K / 2 behind them. Magnitude k of the first is at bits 4 k, of the second at 16 + 4 k; their signs are
    at 8 k + 7 and 8 k + 3. Scales are e4m3 as uint8, one for 16 elements in their order; `factors` float32 [E, 2] are
    the scales of the matrices times FACTOR.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_scale: torch.Tensor | None = None
    down_scale: torch.Tensor | None = None
    factors: torch.Tensor | None = None

    @property
    def inner(self) -> int:
        """I."""
        return self.gate_up.shape[1] // 2


def words(codes: torch.Tensor) -> torch.Tensor:
    """ModelOpt's order (neighbours in a byte) uint8 [..., K/2] to that of `Experts`, int32 [..., K/8] as uint8."""
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).int()
    first, second = (half.unflatten(-1, (-1, 4)) for half in nibbles.chunk(2, dim=-1))
    place = torch.arange(4, device=codes.device)
    magnitudes = ((first & 7) << 4 * place) | ((second & 7) << 16 + 4 * place)
    signs = ((first >> 3) << 8 * place + 7) | ((second >> 3) << 8 * place + 3)
    joined: torch.Tensor = (magnitudes | signs).sum(-1).int()
    return joined.view(torch.uint8)


def values(packed_codes: torch.Tensor) -> torch.Tensor:
    """The other way, and what the codes stand for: float32 [..., K]."""
    word, place = packed_codes.view(torch.int32)[..., None], torch.arange(4, device=packed_codes.device)
    halves = []
    for magnitudes, sign in ((4 * place, 8 * place + 7), (16 + 4 * place, 8 * place + 3)):
        halves.append(((word >> magnitudes) & 7) | (((word >> sign) & 1) << 3))
    table = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), device=packed_codes.device)
    return table[torch.cat([half.flatten(-2) for half in halves], dim=-1)]


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """gate_up [2 I', hidden] and down [hidden, I'], bfloat16."""

    gate_up: torch.Tensor
    down: torch.Tensor


def dequantize(codes: torch.Tensor, scale: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Codes and scales as in `Experts` and a factor for each expert to bfloat16 [E, N, K], expert by expert."""
    out = torch.empty(*codes.shape[:2], codes.shape[2] * 2, dtype=torch.bfloat16, device=codes.device)
    for expert, factor in enumerate((factors / FACTOR).unbind()):
        wide = scale[expert].view(torch.float8_e4m3fn).float() * factor
        out[expert] = (values(codes[expert]).unflatten(-1, (-1, GROUP)) * wide[..., None]).flatten(-2)
    return out


def plain_gate_up(experts: Experts) -> torch.Tensor:
    """In bfloat16."""
    if experts.factors is None or experts.gate_up_scale is None:
        return experts.gate_up
    return dequantize(experts.gate_up, experts.gate_up_scale, experts.factors[:, 0])


def plain_down(experts: Experts) -> torch.Tensor:
    """In bfloat16."""
    if experts.factors is None or experts.down_scale is None:
        return experts.down
    return dequantize(experts.down, experts.down_scale, experts.factors[:, 1])
