"""Products of NVFP4 activations with NVFP4 weights, for tensor cores that multiply FP4 (compute capability 10.x): what
they take, and where a scale lies. The twin is `quantization.w4a4`.

Activations are quantized as weights were, by a scale that the checkpoint has for them. So a product is

    y[m, n] = alpha * sum over k of x[m, k] sx[m, k // 16] * w[n, k] sw[n, k // 16]

with x and w codes' values, sx and sw scales in e4m3, and alpha the product of both matrices' scales.

The tensor cores read scales in tiles of 128 rows by 4 columns (`SfKMajorAtom` in CUTLASS' sm100_blockscaled_layout.hpp,
`get_sf_out_offset_128x4` of FlashInfer): tiles of a row one behind the other, rows of tiles below each other; in a
tile, row r and column c are at byte 16 (r mod 32) + 4 (r div 32) + c. Both dimensions are filled up with zeros.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

GROUP = 16  # elements of a row that share a scale
TILE_ROWS, TILE_COLUMNS, TILE_BAND = 128, 4, 32
MULTIPLE = 32  # of the rows and columns of a matrix: FlashInfer's `fp4_gemm`
HIDDEN_MULTIPLE, INNER_MULTIPLE = 128, 64  # of experts: no tile is filled up, and gate and up share none


@dataclass(frozen=True, slots=True)
class Weight:
    """One matrix [N, K].

    codes uint8 [N, K / 2], even k in the low nibble; scales uint8 (e4m3) `swizzled`; alpha float32 [1], the scale of
    the matrix times that of its inputs; encode float32 [1], what inputs are multiplied by: 1 / their scale.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    alpha: torch.Tensor
    encode: torch.Tensor


@dataclass(frozen=True, slots=True)
class Experts:
    """E experts, as Weight each: **up and then gate** joined [2 I, hidden], and down [hidden, I].

    codes uint8 [E, N, K / 2]; scales uint8 [E, N, K / 16], each expert's `swizzled`; alphas and encodes float32 [E].
    """

    up_gate: torch.Tensor
    up_gate_scales: torch.Tensor
    up_gate_alpha: torch.Tensor
    up_gate_encode: torch.Tensor
    down: torch.Tensor
    down_scales: torch.Tensor
    down_alpha: torch.Tensor
    down_encode: torch.Tensor


class Products(Protocol):
    """Who multiplies."""

    def linear(self, x: torch.Tensor, weight: Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [M, K] bfloat16 times W' [M, N], plus `bias`."""

    def experts(self, x: torch.Tensor, experts: Experts, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """A mixture [T, hidden] of x [T, hidden] bfloat16: sum over j of weights[t, j] * down_e(silu(gate_e x_t) * up_e
        x_t), with e = chosen[t, j]. chosen int32 [T, k], weights float32 [T, k]."""


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """uint8 [..., N, C], one of each 16 columns, to the tensor cores' order, filled up to [..., N', C']."""
    rows, columns = scales.shape[-2:]
    filled = F.pad(scales, (0, -columns % TILE_COLUMNS, 0, -rows % TILE_ROWS))
    tiles = filled.unflatten(-1, (-1, TILE_COLUMNS)).unflatten(-3, (-1, TILE_ROWS // TILE_BAND, TILE_BAND))
    found: torch.Tensor = tiles.movedim(-2, -4).transpose(-3, -2)  # row of tiles, tile, r mod 32, r div 32, c
    return found.reshape(filled.shape)


def unswizzled(scales: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    """The other way, without what was filled up: uint8 [..., num_rows, num_columns]."""
    rows, columns = scales.shape[-2:]
    shape = (*scales.shape[:-2], rows // TILE_ROWS, columns // TILE_COLUMNS, TILE_BAND, -1, TILE_COLUMNS)
    tiles = scales.reshape(shape).transpose(-3, -2).movedim(-4, -2)
    found: torch.Tensor = tiles.reshape(scales.shape)[..., :num_rows, :num_columns]
    return found


def fits(num_rows: int, num_columns: int) -> bool:
    """Whether the kernels divide a matrix of this shape."""
    return not (num_rows % MULTIPLE or num_columns % MULTIPLE)


def experts_fit(hidden: int, inner: int) -> bool:
    """Whether the kernels divide experts of this shape."""
    return not (hidden % HIDDEN_MULTIPLE or inner % INNER_MULTIPLE)
