// Causal attention of a step's tokens straight over the page-major pool.
//
// A unit of work is (sequence, KV head, up to 48 query rows: the query heads that share the KV head, of successive
// tokens). It walks the context in spans of 32 tokens at fixed positions, with a running maximum and sum (Milakov &
// Gimelshein 2018, algorithm 3), through the same register tiles as the matrix products. The order of additions depends
// on nothing but the positions, so chunked, batched and cached computation agree to the bit.
#pragma once
#include "gemm.h"

namespace forebay {

constexpr int SPAN = PANEL;     // tokens of context at a time
constexpr int MAX_QUERIES = 48; // query rows at a time
constexpr int MAX_HEAD_DIM = 256;

// One layer's keys and values in the pool: rows of head_dim, page_size of them for each head and kind, wherever those are.
struct Pages {
    char* base;
    int64_t page_bytes;
    int64_t page_size;
    int64_t kind_stride, head_stride;  // in elements
    int64_t head_dim;

    template <class T> T* key(const int32_t* page_ids, long position, long head) const {
        T* page = (T*)(base + page_ids[position / page_size] * page_bytes);
        return page + head * head_stride + position % page_size * head_dim;
    }
    // From a token's key to its value.
    long to_value() const { return kind_stride; }
};

// Scratch of one thread.
template <class T> struct Scratch {
    alignas(64) uint32_t keys[MAX_HEAD_DIM * SPAN];
    alignas(64) uint32_t values[MAX_HEAD_DIM * SPAN];
    alignas(64) float scores[MAX_QUERIES * SPAN];
    alignas(64) float attended[MAX_QUERIES * MAX_HEAD_DIM];
    alignas(64) T chances[MAX_QUERIES * SPAN];
    alignas(64) T zeros[MAX_HEAD_DIM];
    alignas(64) float product[TILE_ROWS * PANEL];
    float maxima[MAX_QUERIES], totals[MAX_QUERIES];
};

// 16 x 16 words, turned; `from` holds 16 rows, `to` has rows `to_stride` words apart.
inline void transpose(const uint32_t* const from[LANES], uint32_t* to, long to_stride) {
    u32x16 r[LANES], t[LANES];
    for (int i = 0; i < LANES; i++) r[i] = load<u32x16>(from[i]);
    // Four rounds of interleaving row i with row i + 8 turn the square (a perfect shuffle of rows and columns).
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            t[2 * i] = __builtin_shufflevector(r[i], r[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            t[2 * i + 1] =
                __builtin_shufflevector(r[i], r[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < LANES; i++) r[i] = t[i];
    }
    for (int i = 0; i < LANES; i++) store(to + i * to_stride, r[i]);
}

// Keys of a span as a panel whose columns are tokens: [words of head_dim][32].
template <class T> inline void pack_keys(const T* const rows[SPAN], long head_dim, uint32_t* panel) {
    const long num_words = head_dim / PER_WORD<T>;
    for (long k = 0; k < num_words; k += LANES)
        for (int half = 0; half < 2; half++) {
            const long width = num_words - k < LANES ? num_words - k : LANES;
            if (width == LANES) {
                const uint32_t* from[LANES];
                for (int i = 0; i < LANES; i++) from[i] = (const uint32_t*)rows[half * LANES + i] + k;
                transpose(from, panel + k * SPAN + half * LANES, SPAN);
            } else {
                for (int i = 0; i < LANES; i++)
                    for (long j = 0; j < width; j++)
                        panel[(k + j) * SPAN + half * LANES + i] = ((const uint32_t*)rows[half * LANES + i])[k + j];
            }
        }
}

// Values of a span as panels whose columns are dimensions: [head_dim / 32][words of the span][32].
inline void pack_values(const float* const rows[SPAN], long head_dim, uint32_t* panels) {
    for (long d = 0; d < head_dim; d += LANES)
        for (int i = 0; i < SPAN; i++)
            store(panels + (d / PANEL * SPAN + i) * PANEL + d % PANEL, load<f32x16>(rows[i] + d));
}
inline void pack_values(const bf16* const rows[SPAN], long head_dim, uint32_t* panels) {
    for (int i = 0; i < SPAN / 2; i++)
        for (long d = 0; d < head_dim; d += LANES) {
            const u16x16 even = load<u16x16>(rows[2 * i] + d), odd = load<u16x16>(rows[2 * i + 1] + d);
            const u16x32 pairs = __builtin_shufflevector(even, odd, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            store(panels + (d / PANEL * (SPAN / 2) + i) * PANEL + d % PANEL, pairs);
        }
}

// Scores become chances; the maximum and total of the row move on. Returns the factor for what was gathered before.
template <class T>
inline float soften(float* scores, float scale, long num_visible, float& maximum, float& total, T* chances) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const f32x16 never = splat(-INFINITY);
    f32x16 low = load<f32x16>(scores) * scale, high = load<f32x16>(scores + LANES) * scale;
    low = lane < (int32_t)num_visible ? low : never;
    high = lane + LANES < (int32_t)num_visible ? high : never;
    const float before = maximum;
    const float best = largest(greater(low, high));
    maximum = best > before ? best : before;
    low = exponential(low - maximum);
    high = exponential(high - maximum);
    put(chances, low);
    put(chances + LANES, high);
    const float factor = before == maximum ? 1.0f : exponential(splat(before - maximum))[0];
    total = total * factor + sum(low + high);
    return factor;
}

// Where the keys and values of a span are. What lies behind the context in its last page may be anything: `zeros` instead.
template <class T>
inline void find_span(const Pages& pages, const int32_t* page_ids, long head, long start, long context, const T* zeros,
                      const T* keys[SPAN], const T* values[SPAN]) {
    long left_in_page = 0;
    for (int i = 0; i < SPAN; i++) {
        if (start + i >= context) {
            keys[i] = values[i] = zeros;
            continue;
        }
        if (left_in_page == 0) {
            left_in_page = pages.page_size - (start + i) % pages.page_size;
            keys[i] = pages.key<T>(page_ids, start + i, head);
        } else {
            keys[i] = keys[i - 1] + pages.head_dim;
        }
        left_in_page--;
        values[i] = keys[i] + pages.to_value();
    }
}

// Rows of queries meet the span that is packed in s.keys and s.values: `visible(row)` of its tokens at most. What they
// gather goes to s.attended, whose rows are `stride` long.
template <class T, class S, class Visible>
inline void attend_span(const uint32_t* q, int num_queries, long num_words, long value_dim, long stride, float scale,
                        Visible visible, S& s) {
    const long span_words = SPAN / PER_WORD<T>;
    for (int row = 0; row < num_queries; row += TILE_ROWS) {
        const int rows = num_queries - row < TILE_ROWS ? num_queries - row : TILE_ROWS;
        tile_of<T, 1>(rows, q + row * num_words, num_words, s.keys, num_words, s.scores);
        float factors[TILE_ROWS];
        for (int r = 0; r < rows; r++)
            factors[r] = soften(s.scores + r * SPAN, scale, visible(row + r), s.maxima[row + r], s.totals[row + r],
                                s.chances + r * SPAN);
        for (long d = 0; d < value_dim; d += PANEL) {
            tile_of<T, 1>(rows, (const uint32_t*)s.chances, span_words, s.values + d * span_words, span_words, s.product);
            for (int r = 0; r < rows; r++)
                for (int c = 0; c < PANEL; c += LANES) {
                    float* sum = s.attended + (row + r) * stride + d + c;
                    store(sum, load<f32x16>(sum) * factors[r] + load<f32x16>(s.product + r * PANEL + c));
                }
        }
    }
}

// Attention of `num_queries` rows (words of T, head_dim each, `q_rows` their places) at `positions`, into s.attended.
template <class T>
inline void attend(const uint32_t* q, const int32_t* positions, int num_queries, long context, const int32_t* page_ids,
                   const Pages& pages, long head, Scratch<T>& s) {
    const long head_dim = pages.head_dim, num_words = head_dim / PER_WORD<T>;
    const float scale = 1.0f / sqrtf((float)head_dim);
    const long end = positions[num_queries - 1] + 1;
    memset(s.attended, 0, sizeof(float) * num_queries * MAX_HEAD_DIM);
    for (int i = 0; i < num_queries; i++) s.maxima[i] = -INFINITY, s.totals[i] = 0;
    for (long start = 0; start < end; start += SPAN) {
        const T *keys[SPAN], *values[SPAN];
        find_span(pages, page_ids, head, start, context, s.zeros, keys, values);
        pack_keys(keys, head_dim, s.keys);
        pack_values(values, head_dim, s.values);
        const auto visible = [&](int row) { return positions[row] + 1 - start; };
        attend_span<T>(q, num_queries, num_words, head_dim, MAX_HEAD_DIM, scale, visible, s);
    }
}

}  // namespace forebay
