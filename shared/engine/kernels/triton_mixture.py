"""What a mixture of many tokens does beside its grouped products: packed experts made bfloat16, and the chosen experts'
rows weighted and added up where the tokens are.

Many tokens choose every expert, so all of them are made bfloat16 for a layer, which takes what writing and reading them
takes. The twins are `experts.dequantize` and the sum in `layers.moe.Moe`.
"""

import torch
import triton
import triton.language as tl

from shared.engine.kernels.experts import FACTOR, GROUP

WORDS = 256  # of eight codes, that a program decodes
COLUMNS = 1024  # of a token, that a program adds up


@triton.jit
def _dequantize(
    words, scales, factors, out, num_words, rows_each,
    K: tl.constexpr, GROUP: tl.constexpr, FACTOR: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = at < num_words
    row, place = at // (K // 8), at % (K // 8)
    word = tl.load(words + at, inside, 0)
    factor = tl.load(factors + row // rows_each, inside, 0.0)
    each = tl.arange(0, 4)[None, :]
    for half in tl.static_range(2):
        magnitude = (word[:, None] >> (16 * half + 4 * each)) & 7
        sign = (word[:, None] >> (8 * each + 7 - 4 * half)) & 1
        # As an fp16 the bits of a magnitude are its value times 2 ** -14.
        value = ((magnitude << 9) | (sign << 15)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 16384.0
        scale = tl.load(scales + row * (K // GROUP) + half * (K // 2 // GROUP) + place * 4 // GROUP, inside, 0)
        wide = (scale.to(tl.int16) << 7).to(tl.float16, bitcast=True).to(tl.float32) * FACTOR * factor
        to = out + row * K + half * (K // 2) + place * 4
        tl.store(to[:, None] + each, (value * wide[:, None]).to(tl.bfloat16), inside[:, None])


@triton.jit
def _add_up(parts, places, weights, own, out, hidden, TOP_K: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden
    total = tl.load(own + row * hidden + column, inside, 0.0).to(tl.float32)
    for choice in tl.static_range(TOP_K):
        place = tl.load(places + row * TOP_K + choice)
        weight = tl.load(weights + row * TOP_K + choice)
        total += weight * tl.load(parts + place * hidden + column, inside, 0.0).to(tl.float32)
    tl.store(out + row * hidden + column, total.to(out.dtype.element_ty), inside)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """As `experts.dequantize`, equal to the bit; K is a multiple of 32."""
    num_experts, rows, num_bytes = codes.shape
    out = torch.empty(num_experts, rows, 2 * num_bytes, dtype=torch.bfloat16, device=codes.device)
    words = codes.view(torch.int32)
    _dequantize[(triton.cdiv(words.numel(), WORDS),)](
        words, scale, factors / FACTOR, out, words.numel(), rows,
        2 * num_bytes, GROUP, FACTOR, WORDS, num_warps=4,
    )  # fmt: skip
    return out


def add_up(parts: torch.Tensor, places: torch.Tensor, weights: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """own [T, hidden] plus what was chosen: rows `places` int64 [T, top_k] of parts [.., hidden], times `weights`
    float32 [T, top_k]; in float32, rounded to the dtype of `own`."""
    (num_rows, top_k), hidden = places.shape, own.shape[1]
    out = torch.empty_like(own)
    _add_up[(num_rows, triton.cdiv(hidden, COLUMNS))](
        parts, places, weights, own, out, hidden, top_k, COLUMNS, num_warps=4
    )
    return out
