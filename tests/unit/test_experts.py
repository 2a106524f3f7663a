"""Experts in NVFP4 as the GPU's kernels take them."""

import pytest
import torch

from shared.engine.kernels import experts
from shared.engine.quantization import nvfp4
from shared.engine.quantization.packed_experts import packed
from shared.errors import Unsupported

CODES = 0x8E00_8E00  # the bits that two fp16 have of codes


def quantized(rows: int, columns: int) -> nvfp4.Nvfp4Tensor:
    return nvfp4.quantize(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))


def test_words_stand_for_the_same_values_as_the_codes_of_a_checkpoint() -> None:
    stored = quantized(3, 64)
    scale = (stored.scale.float() * stored.scale_2).repeat_interleave(nvfp4.GROUP, dim=-1)
    found = experts.values(experts.words(stored.codes)) * scale
    assert torch.equal(found, nvfp4.dequantize(stored, torch.float32))


def test_a_word_is_what_the_kernels_decode() -> None:
    """Their instructions, one by one: bits brought into place, two codes at a time, and what is 2^14 times as much."""
    stored = quantized(2, 64)
    words = experts.words(stored.codes).view(torch.int32)
    expected = experts.values(experts.words(stored.codes))
    for row in range(2):
        for place, word in enumerate(words[row].tolist()):
            pairs = (word, word << 3, (word & 0x4038_4038) * 66, (word & 0x2007_2007) * 516)
            bits = torch.tensor([(pair & CODES) >> 16 * i & 0xFFFF for pair in pairs for i in range(2)])
            found = bits.to(torch.uint16).view(torch.float16).float() * 2.0**14
            assert torch.equal(found[:4], expected[row, 4 * place : 4 * place + 4])
            assert torch.equal(found[4:], expected[row, 32 + 4 * place : 32 + 4 * place + 4])


def test_experts_dequantize_to_what_was_packed() -> None:
    gate_up, down = [quantized(512, 1024), quantized(512, 1024)], [quantized(1024, 256), quantized(1024, 256)]
    laid_out = packed(gate_up, down)
    for found, stored in ((experts.plain_gate_up(laid_out), gate_up), (experts.plain_down(laid_out), down)):
        assert torch.equal(found, torch.stack([nvfp4.dequantize(one) for one in stored]))


def test_sizes_that_the_kernels_do_not_divide_are_refused() -> None:
    with pytest.raises(Unsupported, match="no multiples of 256 and 1024"):
        packed([quantized(256, 512)], [quantized(512, 128)])
