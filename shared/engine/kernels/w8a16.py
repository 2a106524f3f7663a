"""Matrices in e4m3 that stay so on a GPU, multiplied with activations of 16 bits: how they are kept, and their twin.

Checkpoints have a float32 scale for each block of 128 by 128 (`quantization.fp8_block`). Here rows are counted in
tiles of 16, each with its own scale for every 128 columns: a few bytes more, and matrices whose rows do not fill a
block can be joined, and cut, at any tile. What a warp of `cuda/fp8.cu` reads of a tile is one span of memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

ROWS, COLUMNS = 16, 128  # that share a scale
UNIT, LANES = 16, (8, 4)  # codes that a lane takes at once; lanes for eight rows, and for half of the columns
BLOCK = 128  # rows and columns, in checkpoints
CODE_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Weight:
    """w[n, k] = code[n, k] * scales[n // 16, k // 128], and behind these rows `others`.

    codes float8_e4m3fn [N / 16, K / 128, 2048] as `laid_out` has them; scales float32 [N / 16, K / 128]; others [M, K],
    which the checkpoint has in bfloat16: fp16, which is exact but for what is below 2^-14 (and there off by 2^-25 at
    most).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    others: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows with the others, and columns."""
        return self.num_rows + len(self.others), self.scales.shape[1] * COLUMNS

    @property
    def num_rows(self) -> int:
        """Without the others."""
        return len(self.scales) * ROWS

    @property
    def nbytes(self) -> int:
        """What reading it takes."""
        return self.codes.nbytes + self.scales.nbytes + self.others.nbytes

    def first(self, num_rows: int) -> "Weight":
        """So many rows of it, whole tiles of those in e4m3."""
        assert num_rows % ROWS == 0, "tiles are not cut"
        assert num_rows <= self.num_rows, "the others are not cut"
        return Weight(self.codes[: num_rows // ROWS], self.scales[: num_rows // ROWS], self.others[:0])


def fits(num_rows: int, num_columns: int, first_row: int = 0, first_column: int = 0) -> bool:
    """Whether such a part of a matrix can be kept so: whole tiles, and columns that begin and end with a block."""
    return not (num_rows % ROWS or first_row % ROWS or num_columns % COLUMNS or first_column % COLUMNS)


def laid_out(codes: torch.Tensor) -> torch.Tensor:
    """Codes [N, K] to [N / 16, K / 128, 2048]: of eight rows and 64 columns UNIT codes of each lane, row by row; then
    those of the other columns; then those of the other rows."""
    rows, lanes = LANES
    parts = codes.view(torch.uint8).view(-1, ROWS // rows, rows, codes.shape[1] // COLUMNS, 2, lanes * UNIT)
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(2).contiguous().view(codes.dtype)


def in_rows(codes: torch.Tensor) -> torch.Tensor:
    """The other way round: [N, K]."""
    rows, lanes = LANES
    tiles, steps, _ = codes.shape
    parts = codes.view(torch.uint8).view(tiles, steps, ROWS // rows, 2, rows, lanes * UNIT)
    return parts.permute(0, 2, 4, 1, 3, 5).reshape(tiles * ROWS, steps * COLUMNS).view(codes.dtype)


def of_blocks(codes: torch.Tensor, scales: torch.Tensor, first_row: int = 0) -> Weight:
    """Rows of a matrix with a scale for each block of 128 by 128. `scales` [blocks, K / 128] begin with the block that
    `first_row` of the matrix, which is the first of codes [N, K], lies in. Raises ValueError for others."""
    last_row, num_columns = first_row % BLOCK + len(codes), codes.shape[1]
    wanted = (-(-last_row // BLOCK), num_columns // COLUMNS)
    if tuple(scales.shape) != wanted or codes.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{codes.dtype} {list(codes.shape)} needs scales {list(wanted)}, not {list(scales.shape)}")
    tiles = torch.arange(first_row % BLOCK, first_row % BLOCK + len(codes), ROWS, device=codes.device) // BLOCK
    return Weight(laid_out(codes), scales.float()[tiles].contiguous(), _none(codes))


def join(weights: Sequence[Weight], others: torch.Tensor | None = None) -> Weight:
    """One below the other; none of them but the last may have others, and `others` go behind all."""
    behind = weights[-1].others if others is None else others.half()
    return Weight(
        torch.cat([weight.codes.view(torch.uint8) for weight in weights]).view(torch.float8_e4m3fn),
        torch.cat([weight.scales for weight in weights]),
        behind,
    )


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] and `scale_inv` [ceil(N/128), ceil(K/128)] of a matrix, by the largest magnitude of each block, as
    DeepSeek-V3's checkpoints have it: scale_inv = amax / 448."""
    num_rows, num_columns = weight.shape
    padded = F.pad(weight.float(), (0, -num_columns % BLOCK, 0, -num_rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    amax = blocks.abs().amax((1, 3))
    scales = torch.where(amax == 0, torch.ones_like(amax), amax) / CODE_MAX
    codes = (blocks / scales[:, None, :, None]).flatten(2).flatten(0, 1)[:num_rows, :num_columns]
    return codes.to(torch.float8_e4m3fn), scales


def unpack(weight: Weight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[N + M, K]; the products are computed in float32 and rounded once."""
    scales = weight.scales.repeat_interleave(ROWS, 0).repeat_interleave(COLUMNS, 1)
    return torch.cat(((in_rows(weight.codes).float() * scales).to(dtype), weight.others.to(dtype)))


def _none(codes: torch.Tensor) -> torch.Tensor:
    return codes.new_empty(0, codes.shape[1], dtype=torch.float16)
