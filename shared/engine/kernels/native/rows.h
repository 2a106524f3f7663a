// What is done to each token's row by itself: norms, rotation, writing into pages.
#pragma once
#include "vec.h"

namespace forebay {

// x * weight / rms(x) over n values; in and out may be the same.
template <class T> inline void rms_norm(const float* x, const float* weight, long n, float eps, T* out) {
    f32x16 squares = {};
    const long whole = n / LANES * LANES;
    const int rest = (int)(n - whole);
    for (long i = 0; i < whole; i += LANES) {
        const f32x16 v = load<f32x16>(x + i);
        squares += v * v;
    }
    if (rest) {
        const f32x16 v = widen_some(x + whole, rest);
        squares += v * v;
    }
    const f32x16 scale = splat(1.0f / sqrtf(sum(squares) / n + eps));
    for (long i = 0; i < whole; i += LANES) put(out + i, load<f32x16>(x + i) * scale * load<f32x16>(weight + i));
    if (rest) put_some(out + whole, widen_some(x + whole, rest) * scale * widen_some(weight + whole, rest), rest);
}

// Rotary embedding of one head, halves paired.
template <class T> inline void rotate(const float* x, const float* cos, const float* sin, long head_dim, T* out) {
    const long half = head_dim / 2, whole = half / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) {
        const f32x16 first = load<f32x16>(x + i), second = load<f32x16>(x + half + i);
        const f32x16 c = load<f32x16>(cos + i), s = load<f32x16>(sin + i);
        put(out + i, first * c - second * s);
        put(out + half + i, second * c + first * s);
    }
    if (const int rest = (int)(half - whole)) {
        const f32x16 first = widen_some(x + whole, rest), second = widen_some(x + half + whole, rest);
        const f32x16 c = widen_some(cos + whole, rest), s = widen_some(sin + whole, rest);
        put_some(out + whole, first * c - second * s, rest);
        put_some(out + half + whole, second * c + first * s, rest);
    }
}

// One head of queries or keys: normed if the model does that, then rotated.
template <class T>
inline void norm_rotate(const float* x, const float* norm, float eps, const float* cos, const float* sin, long head_dim,
                        T* out) {
    float normed[512];
    if (norm) {
        rms_norm(x, norm, head_dim, eps, normed);
        x = normed;
    }
    rotate(x, cos, sin, head_dim, out);
}

template <class From, class To> inline void convert(const From* x, long n, To* out) {
    const long whole = n / LANES * LANES;
    for (long i = 0; i < whole; i += LANES) put(out + i, widen(x + i));
    if (n > whole) put_some(out + whole, widen_some(x + whole, (int)(n - whole)), (int)(n - whole));
}

}  // namespace forebay
