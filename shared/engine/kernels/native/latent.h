// Absorbed latent attention (DeepSeek-V2, section 2.1.2) of one token over the tokens that were selected for it.
//
// All heads attend to the same rows, of which the first part is the value, too. They are walked in spans of 32, in the
// order in which they were selected, with a running maximum and sum (see attention.h): the result depends on the selection
// alone.
#pragma once
#include "attention.h"

namespace forebay {

// One layer's cached rows in the pool, page_size of them per page.
struct PagedRows {
    char* base;  // of page 0
    int64_t page_bytes, page_size, row_bytes;

    template <class T> T* at(int64_t page, int64_t offset) const {
        return (T*)(base + page * page_bytes + offset * row_bytes);
    }
    // Of a position, in the pages of its sequence.
    template <class T> T* find(const int64_t* page_ids, int64_t position) const {
        return at<T>(page_ids[position / page_size], position % page_size);
    }
};

// Scratch of one thread, for rows of `dim` of which `value_dim` are the value.
template <class T> struct LatentScratch {
    long dim, value_dim;
    uint32_t *keys, *values;
    float *scores, *attended, *product;
    T *chances, *zeros;
    float maxima[MAX_QUERIES], totals[MAX_QUERIES];

    static int64_t num_floats(long dim, long value_dim) {
        return (dim + panels_of(value_dim)) * SPAN + 2 * MAX_QUERIES * SPAN + MAX_QUERIES * panels_of(value_dim) +
               TILE_ROWS * PANEL + dim;
    }
    LatentScratch(long dim, long value_dim, float* room) : dim(dim), value_dim(value_dim) {
        keys = (uint32_t*)room;
        values = keys + dim * SPAN;
        scores = (float*)values + panels_of(value_dim) * SPAN;
        chances = (T*)(scores + MAX_QUERIES * SPAN);
        product = scores + 2 * MAX_QUERIES * SPAN;
        attended = product + TILE_ROWS * PANEL;
        zeros = (T*)(attended + MAX_QUERIES * panels_of(value_dim));
        std::fill(zeros, zeros + dim, T{});
    }
};

// `num_queries` heads q [.., words of dim] over the `num` positions at `chosen`; out gets [num_queries, value_dim].
template <class T>
inline void attend_chosen(const uint32_t* q, int num_queries, const int64_t* chosen, long num, const int64_t* page_ids,
                          const PagedRows& latents, float scale, LatentScratch<T>& s, T* out) {
    const long num_words = s.dim / PER_WORD<T>, width = panels_of(s.value_dim);
    memset(s.attended, 0, sizeof(float) * num_queries * width);
    for (int i = 0; i < num_queries; i++) s.maxima[i] = -INFINITY, s.totals[i] = 0;
    for (long start = 0; start < num; start += SPAN) {
        const T* rows[SPAN];
        for (int i = 0; i < SPAN; i++)
            rows[i] = start + i < num ? latents.find<T>(page_ids, chosen[start + i]) : s.zeros;
        pack_keys(rows, s.dim, s.keys);
        pack_values(rows, s.value_dim, s.values);
        attend_span<T>(q, num_queries, num_words, width, width, scale, [&](int) { return num - start; }, s);
    }
    for (int i = 0; i < num_queries; i++) {
        const f32x16 factor = splat(1.0f / s.totals[i]);
        for (long d = 0; d < s.value_dim; d += LANES)
            put(out + i * s.value_dim + d, load<f32x16>(s.attended + i * width + d) * factor);
    }
}

}  // namespace forebay
