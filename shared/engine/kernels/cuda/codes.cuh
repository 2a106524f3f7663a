// Codes of NVFP4 as what tensor cores multiply; `experts.Experts` says how they lie.
#pragma once
#include "chosen.cuh"

namespace forebay {

// A word of codes to operands: of the four elements that come first, and of those half a row on.
__device__ __forceinline__ void decode(uint32_t word, uint32_t low_scale, uint32_t high_scale, uint32_t (&first)[2], uint32_t (&second)[2]) {
    const uint32_t magnitudes = word & 0x77777777u;
    const uint32_t a = __byte_perm(0x3E3C3800u, 0x46444240u, magnitudes) | (word & 0x80808080u);
    const uint32_t b = __byte_perm(0x3E3C3800u, 0x46444240u, magnitudes >> 16) | ((word << 4) & 0x80808080u);
    first[0] = times_half(__byte_perm(a, 0, 0x1404), low_scale), first[1] = times_half(__byte_perm(a, 0, 0x3424), low_scale);
    second[0] = times_half(__byte_perm(b, 0, 0x1404), high_scale), second[1] = times_half(__byte_perm(b, 0, 0x3424), high_scale);
}

// Units of rows g and g + 8 times the lane's 32 values `b` of a column. `scales` of both halves of g, and of g + 8.
__device__ __forceinline__ void multiply_units(float (&low)[4], float (&high)[4], const uint4& row, const uint4& row_8,
                                               const uint32_t (&scales)[4], const uint4 (&b)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        uint32_t one[2], one_high[2], other[2], other_high[2];
        decode(word_of(row, i), scales[0], scales[1], one, one_high);
        decode(word_of(row_8, i), scales[2], scales[3], other, other_high);
        const uint32_t a[4] = {one[0], other[0], one[1], other[1]}, c[4] = {one_high[0], other_high[0], one_high[1], other_high[1]};
        multiply_half(low, a, word_of(b[i / 2], i % 2 * 2), word_of(b[i / 2], i % 2 * 2 + 1));
        multiply_half(high, c, word_of(b[2 + i / 2], i % 2 * 2), word_of(b[2 + i / 2], i % 2 * 2 + 1));
    }
}

// A column's values for `unit`, of a row whose second half begins `half` values on.
__device__ __forceinline__ void values_of(uint4 (&b)[4], const __half* row, int unit, int half) {
    const auto* low = reinterpret_cast<const uint4*>(row + unit * 16);
    const auto* high = reinterpret_cast<const uint4*>(row + half + unit * 16);
    b[0] = low[0], b[1] = low[1], b[2] = high[0], b[3] = high[1];
}

}  // namespace forebay
