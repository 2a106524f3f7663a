// Matrix products with weights in panels: out[m, n] = sum over k of a[m, k] * w[n, k].
//
// A panel holds 32 output columns: for each word of k, 32 words, one of each column (kernels/native.py packs them). A
// tile keeps rows x columns of sums in registers over the whole of k. So every output is one sum in ascending k, no
// matter how many rows are computed with it: results do not depend on how a batch is composed.
#pragma once
#include "vec.h"

namespace forebay {

constexpr int PANEL = 2 * LANES;
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12;  // 24 of 32 registers hold sums
#else
constexpr int TILE_ROWS = 3;
#endif
constexpr int BLOCK_ROWS = 4 * TILE_ROWS;  // rows that share one pass over a panel

// Sums of ROWS rows with GROUP panels. `a` rows are `stride` words apart; out is [ROWS, GROUP * PANEL]. Not inlined:
// the caller's variables would take registers from the sums.
template <class T, int ROWS, int GROUP>
__attribute__((noinline)) void tile(const uint32_t* a, long stride, const uint32_t* w, long num_words, float* out) {
    f32x16 sums[ROWS][2 * GROUP] = {};
    const long panel_words = num_words * PANEL;
    for (long k = 0; k < num_words; k++) {
        u32x16 columns[2 * GROUP];
#pragma GCC unroll 8
        for (int g = 0; g < GROUP; g++) {
            const uint32_t* at = w + g * panel_words + k * PANEL;
            columns[2 * g] = load<u32x16>(at);
            columns[2 * g + 1] = load<u32x16>(at + LANES);
        }
#pragma GCC unroll 16
        for (int row = 0; row < ROWS; row++) {
#pragma GCC unroll 8
            for (int c = 0; c < 2 * GROUP; c++) sums[row][c] = mac<T>(sums[row][c], columns[c], a[row * stride + k]);
        }
    }
    for (int row = 0; row < ROWS; row++)
        for (int c = 0; c < 2 * GROUP; c++) store(out + row * GROUP * PANEL + c * LANES, sums[row][c]);
}

template <class T, int GROUP>
inline void tile_of(int rows, const uint32_t* a, long stride, const uint32_t* w, long num_words, float* out) {
    switch (rows) {
#define FOREBAY_TILE(R) \
    case R:             \
        return tile<T, (R <= TILE_ROWS ? R : 1), GROUP>(a, stride, w, num_words, out);
        FOREBAY_TILE(1)
        FOREBAY_TILE(2)
        FOREBAY_TILE(3)
        FOREBAY_TILE(4)
        FOREBAY_TILE(5)
        FOREBAY_TILE(6)
        FOREBAY_TILE(7)
        FOREBAY_TILE(8)
        FOREBAY_TILE(9)
        FOREBAY_TILE(10)
        FOREBAY_TILE(11)
        FOREBAY_TILE(12)
#undef FOREBAY_TILE
    }
}

// Panels to take side by side for so many rows, to have enough sums in flight.
inline int group_for(int rows) { return rows <= 2 ? 4 : rows <= TILE_ROWS / 2 ? 2 : 1; }

template <class T>
inline void tile_group(int group, int rows, const uint32_t* a, long stride, const uint32_t* w, long words, float* out) {
    if (group == 4) {
        if (rows == 1) return tile<T, 1, 4>(a, stride, w, words, out);
        return tile<T, 2, 4>(a, stride, w, words, out);
    }
    if (group == 2) {
        switch (rows) {
            case 1: return tile<T, 1, 2>(a, stride, w, words, out);
            case 2: return tile<T, 2, 2>(a, stride, w, words, out);
            case 3: return tile<T, 3, 2>(a, stride, w, words, out);
            case 4: return tile<T, 4, 2>(a, stride, w, words, out);
            case 5: return tile<T, 5, 2>(a, stride, w, words, out);
            default: return tile<T, 6, 2>(a, stride, w, words, out);
        }
    }
    tile_of<T, 1>(rows, a, stride, w, words, out);
}

// A packed matrix [columns, words of k].
struct Linear {
    const uint32_t* panels;
    const float* bias;  // padded to whole panels, or null
    int64_t num_panels;
    int64_t num_words;
};

// Units of a product: panels x blocks of rows, a panel's blocks in a row.
inline long num_blocks(long num_rows) { return (num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }

// The units [first, last) of a w'; `finish(row, column, sums)` gets 32 columns of a row at a time.
template <class T, class Finish>
inline void multiply(const uint32_t* a, long stride, long num_rows, const Linear& w, long first, long last,
                     Finish finish) {
    const long blocks = num_blocks(num_rows);
    alignas(64) float sums[12 * PANEL];  // 12 rows of 1 panel, 6 of 2 or 2 of 4
    for (long unit = first; unit < last;) {
        const long panel = unit / blocks, start = unit % blocks * BLOCK_ROWS;
        const long end = start + BLOCK_ROWS < num_rows ? start + BLOCK_ROWS : num_rows;
        int group = blocks == 1 ? group_for((int)(end - start)) : 1;
        while (group > last - unit) group /= 2;
        const uint32_t* panels = w.panels + panel * w.num_words * PANEL;
        for (long row = start; row < end; row += TILE_ROWS) {
            const int rows = (int)(end - row < TILE_ROWS ? end - row : TILE_ROWS);
            tile_group<T>(group, rows, a + row * stride, stride, panels, w.num_words, sums);
            for (int r = 0; r < rows; r++)
                for (int g = 0; g < group; g++) finish(row + r, (panel + g) * PANEL, sums + (r * group + g) * PANEL);
        }
        unit += group;
    }
}

}  // namespace forebay
