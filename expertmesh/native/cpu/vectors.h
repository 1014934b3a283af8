// Sixteen numbers at a time, on any processor: the compiler makes of them what the machine has.
#pragma once
#include "team.h"
#include <cmath>
#include <cstring>

using bf16 = uint16_t;
typedef float F16 __attribute__((vector_size(64), aligned(4)));
typedef int32_t I16 __attribute__((vector_size(64), aligned(4)));
typedef uint32_t U16 __attribute__((vector_size(64), aligned(4)));
typedef uint16_t H16 __attribute__((vector_size(32), aligned(2)));
typedef uint8_t B16 __attribute__((vector_size(16), aligned(1)));
constexpr int LANES = 16;
#define INLINE inline __attribute__((always_inline))

INLINE F16 all(float x) { return x - (F16){}; }
INLINE I16 all(int32_t x) { return x - (I16){}; }
INLINE F16 load(const float* p) { return *reinterpret_cast<const F16*>(p); }
INLINE void store(float* p, F16 x) { *reinterpret_cast<F16*>(p) = x; }

INLINE F16 widen(H16 x) { return (F16)(__builtin_convertvector(x, U16) << 16); }
INLINE F16 load(const bf16* p) { return widen(*reinterpret_cast<const H16*>(p)); }

// a * b + c, rounded once where the processor does that. Compilers may not decide it (-ffp-contract=off): they do so anew
// wherever code is inlined, and results would depend on the path to them.
INLINE F16 fused(F16 a, F16 b, F16 c) {
#if defined(__AVX512F__)
    return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
    typedef __m256 Halves[2];
    Halves x, y, z;
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
    memcpy(&c, z, 64);
    return c;
#elif defined(__ARM_FEATURE_FMA)
    float32x4_t x[4], y[4], z[4];
    memcpy(x, &a, 64), memcpy(y, &b, 64), memcpy(z, &c, 64);
    for (int i = 0; i < 4; ++i) z[i] = vfmaq_f32(z[i], x[i], y[i]);
    memcpy(&c, z, 64);
    return c;
#else
    return a * b + c;
#endif
}

// To the nearest, ties to even.
INLINE H16 narrow(F16 x) {
#if defined(__AVX512BF16__)
    return (H16)_mm512_cvtneps_pbh((__m512)x);
#endif
    U16 bits = (U16)x;
    U16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    U16 nan = (U16)(x != x);
    return __builtin_convertvector((rounded & ~nan) | (0x7fc0 & nan), H16);
}
INLINE void store(bf16* p, F16 x) { *reinterpret_cast<H16*>(p) = narrow(x); }

INLINE float widen(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
INLINE bf16 narrow(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
INLINE float as_float(float x) { return x; }
INLINE float as_float(bf16 x) { return widen(x); }
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) { *p = narrow(x); }

INLINE F16 max(F16 a, F16 b) { return a > b ? a : b; }
INLINE F16 abs(F16 a) { return (F16)((U16)a & 0x7fffffffu); }
INLINE F16 evens(F16 a, F16 b) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
}
INLINE F16 odds(F16 a, F16 b) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}
// All numbers of a vector, in pairs whose distance halves.
template <class Op> INLINE float fold(F16 x, Op op) {
    x = op(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = op(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = op(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = op(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
    return x[0];
}
INLINE float sum(F16 x) {
    return fold(x, [](F16 a, F16 b) { return a + b; });
}
INLINE float largest(F16 x) {
    return fold(x, [](F16 a, F16 b) { return max(a, b); });
}

// e^x within two units of the last place (Cephes' expf); 0 far below, infinity far above.
INLINE F16 exponential(F16 x) {
    F16 top = all(88.72284f), low = all(-87.33655f);
    F16 in = x > top ? top : (x < low ? low : x);
    // The sum has no room for fractions: it is rounded, and its last bits are the whole number.
    F16 round = all(12582912.0f), shifted = fused(in, all(1.44269504088896341f), round);
    F16 back = shifted - round;
    F16 r = fused(back, all(-0.693359375f), in);
    r = fused(back, all(2.12194440e-4f), r);
    F16 p = all(1.9875691500e-4f);
    for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        p = fused(p, r, all(next));
    p = fused(p, r * r, r) + 1.0f;
    // In two steps, since 2^128 is no float.
    I16 whole = (I16)shifted - (I16)round, half = whole >> 1;
    F16 first = (F16)((half + 127) << 23), second = (F16)((whole - half + 127) << 23);
    p = p * first * second;
    p = x < low ? all(0.0f) : p;
    return x != x ? x : p;
}
INLINE F16 sigmoid(F16 x) { return 1.0f / (1.0f + exponential(-x)); }
INLINE F16 silu(F16 x) { return x / (1.0f + exponential(-x)); }

// f(i, lanes) for pieces of sixteen of n, the last perhaps shorter.
template <class Use> INLINE void by_lanes(i64 n, Use use) {
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) use(i, LANES);
    if (i < n) use(i, int(n - i));
}
template <class T> INLINE F16 load(const T* p, int lanes) {
    if (lanes == LANES) return load(p);
    F16 out = {};
    for (int i = 0; i < lanes; ++i) out[i] = as_float(p[i]);
    return out;
}
template <class T> INLINE void store(T* p, F16 x, int lanes) {
    if (lanes == LANES) return store(p, x);
    for (int i = 0; i < lanes; ++i) put(p + i, x[i]);
}

// n numbers of one type to another.
template <class T, class O> INLINE void convert(const T* from, i64 n, O* to) {
    by_lanes(n, [&](i64 i, int lanes) { store(to + i, load(from + i, lanes), lanes); });
}

// 1 / root mean square, of n numbers.
template <class T> inline float inverse_rms(const T* x, i64 n, float eps) {
    F16 squares = {};
    by_lanes(n, [&](i64 i, int lanes) { F16 v = load(x + i, lanes); squares = fused(v, v, squares); });
    return 1.0f / std::sqrt(sum(squares) / float(n) + eps);
}

// out = x, scaled to a root mean square of one, times the weight.
template <class T, class O> inline void rms_norm(const T* x, const bf16* weight, float eps, i64 n, O* out) {
    F16 scale = all(inverse_rms(x, n, eps));
    by_lanes(n, [&](i64 i, int lanes) {
        store(out + i, load(x + i, lanes) * scale * load(weight + i, lanes), lanes);
    });
}
