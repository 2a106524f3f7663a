"""How many matrices stay dequantized: the first ones, as far as memory goes."""

import pytest
import torch

from shared.engine.kernels import w4a16
from shared.engine.kernels.dequantized_ahead import first_of

SHAPES = ((48, 128), (16, 512), (32, 256), (16, 128))


@pytest.mark.parametrize(
    ("num_bytes", "number"),
    [(0, 0), (12_287, 0), (12_288, 1), (28_671, 1), (28_672, 2), (45_055, 2), (45_056, 3), (1 << 40, 4)],
)
def test_matrices_are_kept_in_their_order_until_one_does_not_fit(num_bytes: int, number: int) -> None:
    """48 x 128, 16 x 512, 32 x 256 and 16 x 128 values of two bytes; a small one behind one that is too large waits."""
    matrices = [packed(*shape) for shape in SHAPES]
    assert list(map(id, first_of(matrices, num_bytes))) == list(map(id, matrices[:number]))


def packed(rows: int, columns: int) -> w4a16.PackedWeight:
    scale = torch.ones(rows, columns // w4a16.GROUP).to(torch.float8_e4m3fn)
    return w4a16.pack(torch.zeros(rows, columns // 2, dtype=torch.uint8), scale, torch.tensor(1.0))
