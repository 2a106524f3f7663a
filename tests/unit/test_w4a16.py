"""Packed NVFP4 weights: nothing is lost when they are laid out, and the twin's products are those of plain torch."""

import pytest
import torch

from shared.engine.kernels import w4a16
from shared.engine.quantization import nvfp4
from shared.engine.quantization.nvfp4 import Nvfp4Tensor


def quantized(rows: int, columns: int, seed: int) -> Nvfp4Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight *= torch.logspace(-3, 0, rows)[:, None]  # scales down to e4m3's subnormal numbers
    return nvfp4.quantize(weight)


@pytest.mark.parametrize(
    ("rows", "columns", "gated"), [(16, 128, False), (48, 576, False), (40, 80, False), (96, 208, True)]
)
def test_what_is_packed_comes_back(rows: int, columns: int, gated: bool) -> None:
    tensor = quantized(rows, columns, 1)
    packed = w4a16.pack(tensor.codes, tensor.scale, tensor.scale_2, gated=gated)
    torch.testing.assert_close(w4a16.unpack(packed)[0], nvfp4.dequantize(tensor, torch.float32), rtol=1e-6, atol=0)


def test_a_scale_of_zero_is_zero_whatever_the_codes() -> None:
    tensor = quantized(16, 128, 2)
    scale = tensor.scale.clone()
    scale[3, 2] = 0
    packed = w4a16.pack(tensor.codes, scale, tensor.scale_2)
    expected = nvfp4.dequantize(Nvfp4Tensor(tensor.codes, scale, tensor.scale_2), torch.float32)
    torch.testing.assert_close(w4a16.unpack(packed)[0], expected, rtol=1e-6, atol=0)


def test_each_row_may_have_a_factor_of_its_own() -> None:
    tensor, factors = quantized(16, 128, 3), torch.rand(16)
    packed = w4a16.pack(tensor.codes, tensor.scale, factors)
    one = nvfp4.dequantize(Nvfp4Tensor(tensor.codes, tensor.scale, torch.tensor(1.0)), torch.float32)
    torch.testing.assert_close(w4a16.unpack(packed)[0], one * factors[:, None])


def test_gated_rows_that_make_up_no_tiles_are_refused() -> None:
    tensor = quantized(24, 128, 4)
    with pytest.raises(ValueError, match="12 gated rows"):
        w4a16.pack(tensor.codes, tensor.scale, tensor.scale_2, gated=True)
