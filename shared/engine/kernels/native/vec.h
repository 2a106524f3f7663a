// Sixteen lanes of 32 bits, in GCC's portable vector types; the compiler splits them where the machine is narrower.
//
// Both element types travel as 32-bit words: a float, or a pair of neighbouring bfloat16. One word of weights times one
// word of activations is `mac`, the only operation that differs between the two.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace forebay {

constexpr int LANES = 16;
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint16_t u16x32 __attribute__((vector_size(64)));

struct bf16 {
    uint16_t bits;
};

// Elements in a word.
template <class T> constexpr int PER_WORD = 4 / sizeof(T);

template <class V> inline V load(const void* from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class V> inline void store(void* to, V v) { memcpy(to, &v, sizeof v); }
// Not {} + x, which is an addition more wherever it is done: -0 + 0 is not -0.
inline f32x16 splat(float x) { return f32x16{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
inline u32x16 splat(uint32_t x) { return u32x16{} + x; }

template <class T> inline f32x16 mac(f32x16 acc, u32x16 w, uint32_t a);

template <> inline f32x16 mac<float>(f32x16 acc, u32x16 w, uint32_t a) {
    float x;
    memcpy(&x, &a, 4);
    return acc + (f32x16)w * splat(x);
}

template <> inline f32x16 mac<bf16>(f32x16 acc, u32x16 w, uint32_t a) {
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32((int)a));
#else
    const f32x16 even = (f32x16)(w << 16) * (f32x16)splat(a << 16);
    return acc + even + (f32x16)(w & 0xffff0000u) * (f32x16)splat(a & 0xffff0000u);
#endif
}

// Round to nearest even; a NaN stays one because its payload's top bit is set.
inline u16x16 narrow(f32x16 v) {
#if defined(__AVX512BF16__)
    return (u16x16)_mm512_cvtneps_pbh((__m512)v);
#else
    u32x16 bits = (u32x16)v;
    u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    i32x16 nan = v != v;
    return __builtin_convertvector((rounded & ~(u32x16)nan) | (((bits >> 16) | 0x40u) & (u32x16)nan), u16x16);
#endif
}

template <class T> inline f32x16 widen(const T* from);
template <> inline f32x16 widen<float>(const float* from) { return load<f32x16>(from); }
template <> inline f32x16 widen<bf16>(const bf16* from) {
    return (f32x16)(__builtin_convertvector(load<u16x16>(from), u32x16) << 16);
}

inline void put(float* to, f32x16 v) { store(to, v); }
inline void put(bf16* to, f32x16 v) { store(to, narrow(v)); }

// The first `count` lanes only; used where rows do not fill whole vectors.
template <class T> inline f32x16 widen_some(const T* from, int count) {
    T lanes[LANES] = {};
    memcpy(lanes, from, count * sizeof(T));
    return widen(lanes);
}
template <class T> inline void put_some(T* to, f32x16 v, int count) {
    T lanes[LANES];
    put(lanes, v);
    memcpy(to, lanes, count * sizeof(T));
}

inline f32x16 greater(f32x16 a, f32x16 b) { return a > b ? a : b; }
// What is no number stays none.
inline f32x16 rectified(f32x16 v) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_max_ps(__m512{}, (__m512)v);
#else
    return f32x16{} > v ? f32x16{} : v;
#endif
}

// In which lanes a > b, a bit each.
inline uint32_t which_above(f32x16 a, f32x16 b) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ);
#else
    const i32x16 above = a > b;
    uint32_t bits = 0;
    for (int lane = 0; lane < LANES; lane++) bits |= (uint32_t)(above[lane] & 1) << lane;
    return bits;
#endif
}

// Lanes folded in halves: four steps instead of sixteen.
template <class Op> inline float fold(f32x16 v, Op op) {
    v = op(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = op(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
    v = op(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
    v = op(v, __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
    return v[0];
}
inline float sum(f32x16 v) {
    return fold(v, [](f32x16 a, f32x16 b) { return a + b; });
}
inline float largest(f32x16 v) { return fold(v, greater); }

// e^x for x <= 0 or moderate x > 0, about 2 ulp (the range reduction and polynomial of Cephes' expf). Below -87: 0.
inline f32x16 exponential(f32x16 x) {
    const i32x16 underflow = x < -87.0f;
    x = underflow ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const f32x16 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const f32x16 n = (x * 1.44269504088896341f + magic) - magic;
    x = x - n * 0.693359375f;
    x = x + n * 2.12194440e-4f;
    f32x16 p = splat(1.9875691500e-4f);
    p = p * x + 1.3981999507e-3f;
    p = p * x + 8.3334519073e-3f;
    p = p * x + 4.1665795894e-2f;
    p = p * x + 1.6666665459e-1f;
    p = p * x + 5.0000001201e-1f;
    p = p * (x * x) + x + 1.0f;
    const i32x16 power = (__builtin_convertvector(n, i32x16) + 127) << 23;
    return underflow ? f32x16{} : p * (f32x16)power;
}

inline f32x16 silu(f32x16 x) { return x / (1.0f + exponential(-x)); }

}  // namespace forebay
