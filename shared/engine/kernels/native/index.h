// Index scores of rows against keys in pages, and of each row the best so far.
#pragma once
#include <algorithm>
#include <array>
#include <functional>

#include "attention.h"
#include "rows.h"

namespace forebay {

constexpr int SCORED_ROWS = TILE_ROWS / 2 > 0 ? TILE_ROWS / 2 : 1;  // half of the registers hold what heads add up to

// A layer's index keys, one row per token, page_size of them per page. In E4M3 values have a scale for each token.
struct IndexKeys {
    enum Form : int64_t { FLOAT32, BFLOAT16, E4M3 };

    const char *values, *scales;  // of page 0
    int64_t page_bytes, page_size, row_bytes, dim, form;
};

inline float value_of_e4m3(int code) {
    const int exponent = code >> 3 & 15, mantissa = code & 7;
    if ((code & 0x7f) == 0x7f) return NAN;
    const float size = exponent ? ldexpf((float)(8 + mantissa), exponent - 10) : ldexpf((float)mantissa, -9);
    return code & 0x80 ? -size : size;
}

inline const std::array<float, 256> E4M3_VALUES = [] {
    std::array<float, 256> values;
    for (int code = 0; code < 256; code++) values[code] = value_of_e4m3(code);
    return values;
}();

// One token's key as floats: where it is, or in `room`.
inline const float* key_of(const IndexKeys& keys, const char* values, const char* scale, float* room) {
    if (keys.form == IndexKeys::FLOAT32) return (const float*)values;
    if (keys.form == IndexKeys::BFLOAT16) {
        convert((const bf16*)values, keys.dim, room);
        return room;
    }
    float factor;
    memcpy(&factor, scale, sizeof factor);
    for (long d = 0; d < keys.dim; d++) room[d] = E4M3_VALUES[(uint8_t)values[d]] * factor;
    return room;
}
inline const bf16* key_of(const IndexKeys&, const char* values, const char*, bf16*) { return (const bf16*)values; }

// Keys of a span as a panel, from the pages in which they lie. Behind `end` there may be no page: `zeros` instead.
template <class T>
inline void pack_span(const IndexKeys& keys, const int64_t* page_ids, long start, long end, const T* zeros, T* room,
                      uint32_t* panel) {
    const T* rows[SPAN];
    const int num_keys = (int)std::min<long>(SPAN, end - start);
    long page = start / keys.page_size, offset = start % keys.page_size;
    for (int i = 0; i < SPAN; i++) {
        if (i >= num_keys) {
            rows[i] = zeros;
            continue;
        }
        const long at = page_ids[page] * keys.page_bytes;
        rows[i] = key_of(keys, keys.values + at + offset * keys.row_bytes,
                         keys.scales + at + offset * (long)sizeof(float), room + i * keys.dim);
        if (++offset == keys.page_size) page++, offset = 0;
    }
    pack_keys(rows, keys.dim, panel);
}

// Scores of ROWS rows with a span of keys, [ROWS, SPAN], and which of them are above the row's `least`, a bit each:
// the sum over heads of weight * relu(q . k). What is no number is above nothing. Not inlined, as `tile`.
template <class T, int ROWS>
__attribute__((noinline)) void score_tile(const uint32_t* q, const float* weights, long num_heads, long num_words,
                                          const uint32_t* panel, const float* least, float* out, uint32_t* above) {
    f32x16 scores[ROWS][2] = {};
    for (long head = 0; head < num_heads; head++) {
        f32x16 products[ROWS][2] = {};
        for (long k = 0; k < num_words; k++) {
            const u32x16 low = load<u32x16>(panel + k * SPAN), high = load<u32x16>(panel + k * SPAN + LANES);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++) {
                const uint32_t word = q[(row * num_heads + head) * num_words + k];
                products[row][0] = mac<T>(products[row][0], low, word);
                products[row][1] = mac<T>(products[row][1], high, word);
            }
        }
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++)
            for (int half = 0; half < 2; half++)
                scores[row][half] += splat(weights[row * num_heads + head]) * rectified(products[row][half]);
    }
#pragma GCC unroll 8
    for (int row = 0; row < ROWS; row++) {
        const f32x16 low = scores[row][0], high = scores[row][1], bound = splat(least[row]);
        store(out + row * SPAN, low);
        store(out + row * SPAN + LANES, high);
        above[row] = which_above(low, bound) | which_above(high, bound) << LANES;
    }
}

template <class T, class... Rest> inline void score_rows(int rows, Rest... rest) {
    switch (rows) {
#define FOREBAY_TILE(R) \
    case R:             \
        return score_tile<T, (R <= SCORED_ROWS ? R : 1)>(rest...);
        FOREBAY_TILE(1)
        FOREBAY_TILE(2)
        FOREBAY_TILE(3)
        FOREBAY_TILE(4)
        FOREBAY_TILE(5)
        FOREBAY_TILE(6)
#undef FOREBAY_TILE
    }
}

// A score and whose it is in one number: of two tokens the one to be chosen first has the higher one, and of equal
// scores that is the earlier.
inline uint64_t found_at(float score, long position) {
    uint32_t bits;
    memcpy(&bits, &score, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)position;
}
inline float score_of(uint64_t found) {
    uint32_t bits = (uint32_t)(found >> 32);
    bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
    float score;
    memcpy(&score, &bits, sizeof score);
    return score;
}
inline int64_t position_of(uint64_t found) { return (uint32_t) ~(uint32_t)found; }

// Leaves of `num` found the `top_k` highest, in the order in which they are. Returns how many; `room` is as long.
inline long keep_highest(uint64_t* found, long num, long top_k, uint64_t* room) {
    if (num <= top_k) return num;
    std::copy(found, found + num, room);
    std::nth_element(room, room + top_k - 1, room + num, std::greater<uint64_t>());
    const uint64_t least = room[top_k - 1];
    long kept = 0;
    for (long i = 0; i < num; i++) {
        found[kept] = found[i];
        kept += found[i] >= least;
    }
    return kept;
}

}  // namespace forebay
