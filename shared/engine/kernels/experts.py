"""How experts are laid out for the kernels of `gluon_experts`, and back."""

from dataclasses import dataclass

import torch

FACTOR = 2.0**8  # the bits of a scale (e4m3) as those of an fp16 are its value / FACTOR
GROUP = 16  # elements that share a scale
# Of the first two and the next two elements of a word, and of those half a row on: where the magnitude of the first of
# two begins, and its sign; those of the second are 16 further.
PLACES = ((9, 15), (6, 12), (3, 14), (0, 13))
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by code; bit 3 of a code is the sign


@dataclass(frozen=True, slots=True)
class Experts:
    """E experts' gate and up joined [E, 2 I, hidden], and down [E, hidden, I]. Without scales these are bfloat16.

    With scales they are codes in words of eight, as uint8: word j of a row of K holds elements 4 j to 4 j + 3 and the
    four that are K / 2 behind them. An fp16 with a code's magnitude at bit 9 and its sign at bit 15 is 2^-14 of what
    the code stands for; so lie the first two elements, and the others where few instructions bring them there: see
    PLACES. Scales are e4m3 as uint8, one for 16 elements in their order; `factors` float32 [E, 2] are
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
    pairs = torch.cat([half.unflatten(-1, (-1, 2, 2)) for half in nibbles.chunk(2, dim=-1)], dim=-2)  # [.., K/8, 4, 2]
    magnitude, sign = _places(codes.device)
    joined: torch.Tensor = (((pairs & 7) << magnitude) | ((pairs >> 3) << sign)).sum((-1, -2)).int()
    return joined.view(torch.uint8)


def values(packed_codes: torch.Tensor) -> torch.Tensor:
    """The other way, and what the codes stand for: float32 [..., K]."""
    word, (magnitude, sign) = packed_codes.view(torch.int32)[..., None, None], _places(packed_codes.device)
    pairs = ((word >> magnitude) & 7) | (((word >> sign) & 1) << 3)
    table = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), device=packed_codes.device)
    return table[torch.cat([pairs[..., :2, :].flatten(-3), pairs[..., 2:, :].flatten(-3)], dim=-1)]


def _places(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Of magnitudes and of signs, int32 [4, 2]."""
    of_first = torch.tensor(PLACES, dtype=torch.int32, device=device)
    magnitude, sign = torch.stack((of_first, of_first + 16), dim=-1).unbind(1)
    return magnitude, sign


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
