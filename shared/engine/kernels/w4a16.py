"""Products of bf16 activations with NVFP4 weights that stay packed: what they take, and their twin in plain torch.

Weights are laid out anew once, in the order in which the tensor cores of `cuda/products.cu` take them. A tile is 16
rows by 64 columns. Lane 4 g + q of a warp (g < 8, q < 4) has of rows g and g + 8 the columns 16 q to 16 q + 15: one
group of each, hence one scale of each. Its 32 codes are 16 bytes, loaded at once; two tiles side by side share a word
of scales.

A word holds eight codes of four registers r (row g, row g + 8, then both again two columns on) of two bf16 each, and
its bits stand where a mask and a shift or a multiplication make bf16 of them: magnitude bits at 8..6 and the sign at 15
of each half are a bf16 that is 2^-126 times the code's value. Rotated left by six, the word has the third register's
bits there, and those of the fourth, whose halves have changed places, where one multiplication takes them all there.
Scales are stored as five bits of exponent and three of mantissa without subnormal numbers, which a multiplication turns
into bf16.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

GROUP = 16  # columns that share a scale
ROWS, COLUMNS, CHUNK = 16, 64, 128  # of a tile, and of two
EXPONENT_BIAS = 10  # of a stored scale: 2^-9, the least of e4m3, has exponent 1, and 0 stands for zero
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# For each register the place within half a word of a code's bits, the lowest first; the last is its sign.
BITS = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (14, 10, 11, 13))
CROSSED = 3  # the register whose codes each stand in the other's half


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """One matrix [N, K], or E of them. Rows and columns are filled up with zeros to whole tiles and pairs of tiles.

    codes int32 [E, N / 16, K / 128, 2, 32, 4]; scales uint8 [E, N / 16, K / 128, 32, 4] (tile, then row g and g + 8);
    factors float32 [E, N], the scale of its matrix for each row. Where `gated`, rows are gate's and then up's, and a
    tile holds eight of each: rows g and g + 8 are multiplied with each other later.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    factors: torch.Tensor
    num_rows: int
    num_columns: int
    gated: bool

    @property
    def num_bytes(self) -> int:
        """What reading it takes."""
        return sum(part.nbytes for part in (self.codes, self.scales, self.factors))


Weight = PackedWeight | torch.Tensor  # a bf16 matrix [N, K]


class Products(Protocol):
    """Who multiplies packed weights."""

    def linear(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """x [M, K] times W' [M, N], in the dtype of x. The rows of `weight` are in their old order."""


def pack(codes: torch.Tensor, scale: torch.Tensor, scale_2: torch.Tensor, *, gated: bool = False) -> PackedWeight:
    """Lay out [N, K], or E of them, on their device.

    codes uint8 [(E,) N, K/2], even k in the low nibble; scale float8_e4m3fn [(E,) N, K/16], not negative; scale_2
    float32, one number or one for each row [(E,) N]. Raises ValueError for gated rows that are no multiple of 16.
    """
    if codes.ndim == 2:
        codes, scale = codes[None], scale[None]
    num, rows, columns = codes.shape[0], codes.shape[1], codes.shape[2] * 2
    if gated and rows % ROWS:
        raise ValueError(f"{rows // 2} gated rows do not make up tiles of {ROWS // 2}")
    factors = scale_2.float().expand(num, rows).contiguous()
    nibbles = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
    exponents = _stored_scales(scale)
    nibbles = torch.where((exponents == 0).repeat_interleave(GROUP, dim=-1), 0, nibbles)
    nibbles, exponents = _tiled(nibbles, gated, CHUNK), _tiled(exponents, gated, CHUNK // GROUP)
    tables = torch.tensor(_tables(), dtype=torch.int32, device=codes.device)
    # [E, tile, chunk, half, row 8, of g and g + 8, columns 16 q, step, pair, two] -> lanes together, registers last
    order = nibbles.view(num, -1, 2, 8, columns_of(columns) // CHUNK, 2, 4, 4, 2, 2).permute(
        0, 1, 4, 5, 3, 6, 7, 8, 2, 9
    )
    words = _words(order.flatten(-3, -2), tables)
    # [E, tile, row 8, of two, chunk, half, q] -> [E, tile, chunk, lane, half, of two]
    grouped = exponents.view(num, -1, 2, 8, columns_of(columns) // CHUNK, 2, 4).permute(0, 1, 4, 3, 6, 5, 2)
    scales = grouped.reshape(*grouped.shape[:3], 32, 4).contiguous()
    return PackedWeight(words.reshape(*words.shape[:4], 32, 4).contiguous(), scales, factors, rows, columns, gated)


def unpack(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[E, N, K], rows in their old order."""
    num, tiles, chunks = weight.codes.shape[:3]
    halves = torch.stack((weight.codes & 0xFFFF, weight.codes >> 16), dim=-1)
    found = torch.stack([_nibbles(halves, bits) for bits in BITS], dim=-2)  # [..., lane, step, r, two]
    found[..., CROSSED, :] = found[..., CROSSED, :].flip(-1)
    lanes = found.view(num, tiles, chunks, 2, 8, 4, 4, 2, 2, 2)  # g, q, step, pair, row of two, two
    nibbles = lanes.permute(0, 1, 8, 4, 2, 3, 5, 6, 7, 9).reshape(num, tiles, ROWS, chunks * CHUNK)
    scale = weight.scales.view(num, tiles, chunks, 8, 4, 2, 2).permute(0, 1, 6, 3, 2, 5, 4)
    stored = scale.reshape(num, tiles, ROWS, -1).int()
    wide = torch.where(stored > 0, torch.exp2((stored >> 3) - float(EXPONENT_BIAS)) * (1 + (stored & 7) / 8), 0)
    values = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES), device=scale.device)[nibbles]
    dense = values * wide.repeat_interleave(GROUP, dim=-1)
    rows = _untiled(dense, weight.gated)[:, : weight.num_rows, : weight.num_columns]
    return (rows * weight.factors[..., None]).to(dtype)


class TorchProducts:
    """The twin, on any device."""

    def linear(self, x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
        """As Products."""
        return F.linear(x, unpack(weight, x.dtype)[0])


def columns_of(num_columns: int) -> int:
    """How many columns are stored for so many."""
    return -(-num_columns // CHUNK) * CHUNK


def _stored_scales(scale: torch.Tensor) -> torch.Tensor:
    """uint8, five bits of exponent above three of mantissa; e4m3 has no more, subnormal numbers included."""
    mantissa, exponent = torch.frexp(scale.float())  # in [0.5, 1)
    stored = ((exponent - 1 + EXPONENT_BIAS) << 3) | ((mantissa * 16).int() - 8)
    return torch.where(mantissa > 0, stored, 0).to(torch.uint8)


def _tiled(matrix: torch.Tensor, gated: bool, multiple: int) -> torch.Tensor:
    """[E, N, K] filled up and in the order of tiles: [E, N / 16, 16, K]."""
    rows, columns = matrix.shape[1:]
    padded = F.pad(matrix, (0, -columns % multiple, 0, -rows % ROWS))
    split = padded.unflatten(1, (2, -1, ROWS // 2)).transpose(1, 2) if gated else padded.unflatten(1, (-1, ROWS, 1))
    tiles: torch.Tensor = split.flatten(2, 3)
    return tiles


def _untiled(tiles: torch.Tensor, gated: bool) -> torch.Tensor:
    split = tiles.unflatten(2, (2, ROWS // 2)).transpose(1, 2) if gated else tiles[:, None]
    rows: torch.Tensor = split.flatten(1, 3)
    return rows


def _tables() -> list[list[int]]:
    """For each register, what a code looks like within half a word."""
    return [
        [sum(((code >> bit) & 1) << place for bit, place in enumerate(places)) for code in range(16)] for places in BITS
    ]


def _words(nibbles: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    """[..., register, two] -> int32 [...]."""
    ordered = (nibbles[..., r, :].flip(-1) if r == CROSSED else nibbles[..., r, :] for r in range(len(BITS)))
    halves = sum(tables[r][own.int()] for r, own in enumerate(ordered))
    assert isinstance(halves, torch.Tensor)
    return halves[..., 0] | (halves[..., 1] << 16)


def _nibbles(halves: torch.Tensor, places: tuple[int, ...]) -> torch.Tensor:
    return sum(((halves >> place) & 1) << bit for bit, place in enumerate(places))  # type: ignore[return-value]
