// Codes of NVFP4 as what tensor cores multiply; `experts.Experts` says how they lie.
#pragma once
#include "chosen.cuh"

namespace forebay {

// A scale's bits, twice, as an fp16's: the value times 2^-8. And what codes as they are decoded, times 2^-14, are multiplied by.
__device__ __forceinline__ uint32_t scale_for_codes(uint32_t bits) { return times_half(bits, 0x7400'7400u); }

// A word of codes to operands: of the four elements that come first, and of those half a row on. Times 2^-14 the bits of a code are those
// of an fp16; to bring a magnitude and a sign apart into place is one product, of which other bits are of no use.
__device__ __forceinline__ void decode(uint32_t word, uint32_t low_scale, uint32_t high_scale, uint32_t (&first)[2], uint32_t (&second)[2]) {
    constexpr uint32_t CODES = 0x8E00'8E00u;
    first[0] = times_half(word & CODES, low_scale), first[1] = times_half(word << 3 & CODES, low_scale);
    second[0] = times_half((word & 0x4038'4038u) * 66 & CODES, high_scale), second[1] = times_half((word & 0x2007'2007u) * 516 & CODES, high_scale);
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
