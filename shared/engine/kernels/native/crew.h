// What the threads of a step do together: each has its own view of the step, and takes units of one phase after another.
#pragma once
#include <algorithm>

#include "gemm.h"
#include "share.h"

namespace forebay {

// Where intermediate results lie in a piece of memory; with base null only how much it takes.
struct Room {
    char* base;
    int64_t num_bytes = 0;

    template <class P> void place(P*& pointer, int64_t count) {
        pointer = (P*)(base + num_bytes);
        num_bytes += align(count * sizeof(P));
    }
};

inline int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// The first `width` columns of a row, from `column` on, of which there may be fewer.
template <class T> inline void put_columns(T* row, long column, long width, f32x16 v) {
    if (width - column >= LANES) put(row + column, v);
    else if (width > column) put_some(row + column, v, (int)(width - column));
}

// One thread of a step. Rows are of T and have whole words.
template <class T> struct Member {
    Phase* phase;
    int thread, num_threads;

    static long words(long n) { return (n + PER_WORD<T> - 1) / PER_WORD<T>; }

    // body(i) for every i < count, divided among the threads.
    template <class Body> void each(long count, Body body) {
        share(*phase++, (int)count, (int)std::max(1L, count / (4 * num_threads)), [&](int first, int last) {
            for (int i = first; i < last; i++) body(i);
        });
    }

    // Units of products at a time.
    long chunk_of(long count, long blocks) const {
        return std::clamp(count / (4 * num_threads) / 4 * 4, 4L, std::max(16L, blocks));
    }

    // The product of rows of `a` with `w`, divided among the threads. U is T, or float for a product in float32.
    template <class U, class Finish>
    void product(const U* a, long stride, long num_rows, const Linear& w, Finish finish) {
        const long blocks = num_blocks(num_rows), count = w.num_panels * blocks;
        share(*phase++, (int)count, (int)chunk_of(count, blocks), [&](int first, int last) {
            multiply<U>((const uint32_t*)a, stride / PER_WORD<U>, num_rows, w, first, last, finish);
        });
    }

    // out = a w' + bias, float32.
    template <class U>
    void project(const U* a, long stride, long num_rows, const Linear& w, float* out, long out_stride) {
        product(a, stride, num_rows, w, [=](long row, long column, const float* sums) {
            float* to = out + row * out_stride + column;
            for (int c = 0; c < PANEL; c += LANES) {
                f32x16 v = load<f32x16>(sums + c);
                if (w.bias) v += load<f32x16>(w.bias + column + c);
                store(to + c, v);
            }
        });
    }

    // inner = silu(gate) * up, with a panel of w being 16 columns of gate, then the same 16 of up.
    void project_gated(const T* a, long stride, long num_rows, const Linear& w, T* inner, long inner_stride) {
        product(a, stride, num_rows, w, gated(w, inner, inner_stride));
    }

    // As `finish` of a product: see `project_gated`.
    static auto gated(const Linear& w, T* inner, long inner_stride) {
        return [=, bias = w.bias](long row, long column, const float* sums) {
            f32x16 gate = load<f32x16>(sums), up = load<f32x16>(sums + LANES);
            if (bias) gate += load<f32x16>(bias + column), up += load<f32x16>(bias + column + LANES);
            put_columns(inner + row * inner_stride, column / 2, inner_stride, silu(gate) * up);
        };
    }
};

}  // namespace forebay
