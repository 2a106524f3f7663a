"""NVFP4 and block FP8 weights mean what their makers say."""

import pytest
import torch

from shared.engine.quantization import fp8_block, nvfp4
from shared.engine.quantization.formats import Format, detect
from shared.errors import Unsupported

# What ModelOpt 0.47's NVFP4QTensor.quantize makes of `golden_weight`.
GOLDEN_CODES = bytes.fromhex("bfe5692ec7f45a0ed6724cafe6613db7f5692ed7f45b8ee60000000000000000")
GOLDEN_SCALE = bytes.fromhex("7e7e7d38")
GOLDEN_SCALE_2 = float.fromhex("0x1.30c30c0000000p-12")


def golden_weight() -> torch.Tensor:
    weight = ((torch.arange(64) * 37 % 101 - 50).float() / 64).view(2, 32).bfloat16()
    weight[1, 16:] = 0
    return weight


def test_quantizing_gives_modelopts_bits() -> None:
    made = nvfp4.quantize(golden_weight())
    assert bytes(made.codes.flatten().tolist()) == GOLDEN_CODES
    assert bytes(made.scale.view(torch.uint8).flatten().tolist()) == GOLDEN_SCALE
    assert made.scale_2.item() == GOLDEN_SCALE_2


def test_what_nvfp4_can_say_survives_quantizing_exactly() -> None:
    weight = torch.tensor(nvfp4.MAGNITUDES + tuple(-m for m in nvfp4.MAGNITUDES)).repeat(3, 2) * 448
    assert torch.equal(nvfp4.dequantize(nvfp4.quantize(weight), torch.float32), weight)


def test_matrices_computed_as_one_share_the_scale_of_the_largest() -> None:
    small, large = torch.ones(4, 16), torch.full((4, 16), 8.0)
    assert torch.equal(nvfp4.matrix_scale(small, large), nvfp4.matrix_scale(large))


def test_a_matrix_of_zeros_stays_one() -> None:
    assert not nvfp4.dequantize(nvfp4.quantize(torch.zeros(2, 16))).any()


def test_rows_that_are_no_whole_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        nvfp4.quantize(torch.ones(2, 24))


def test_ragged_blocks_of_fp8_take_their_own_scale() -> None:
    scale = torch.arange(1.0, 11.0).view(5, 2)
    weight = torch.ones(576, 200).to(torch.float8_e4m3fn)
    dense = fp8_block.dequantize(weight, scale, torch.float32)
    assert dense[575, 199] == scale[4, 1]
    assert dense[127, 128] == scale[0, 1]
    assert dense[128, 127] == scale[1, 0]


def test_fp8_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="need scales"):
        fp8_block.dequantize(torch.ones(576, 200).to(torch.float8_e4m3fn), torch.ones(4, 2))


@pytest.mark.parametrize("format_", Format)
def test_a_format_is_known_by_its_tensors(format_: Format) -> None:
    names = {f"a.b.{suffix}" for suffix in (*format_.value, "input_scale", "bias")} | {"a.bc.weight_scale_inv"}
    assert detect("a.b", names) is format_


def test_tensors_that_make_up_no_format_are_refused() -> None:
    with pytest.raises(Unsupported, match="weight_scale"):
        detect("a.b", {"a.b.weight", "a.b.weight_scale"})


def test_a_reciprocal_scale_becomes_a_factor() -> None:
    made = nvfp4.quantize(golden_weight())
    read = nvfp4.from_stored(Format.NVFP4_RECIPROCAL, made.codes, made.scale, 1.0 / made.scale_2)
    torch.testing.assert_close(nvfp4.dequantize(read, torch.float32), nvfp4.dequantize(made, torch.float32))
