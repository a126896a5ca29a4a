// Vectors of floats, as wide as this CPU's registers, and what the kernels do with them.
//
// They are the vector types that GCC and Clang have for every CPU: `a * b + c` on a `vec` is one
// instruction for all its floats. Memory holds float or bfloat16; all arithmetic is in float.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

struct bfloat16 {  // the upper half of a float
    uint16_t upper;
};

inline vec load(const float *from) {
    vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline vec load(const bfloat16 *from) {
    halves upper;
    std::memcpy(&upper, from, sizeof upper);
    return (vec)(__builtin_convertvector(upper, bits) << 16);
}

inline void store(float *to, vec v) { std::memcpy(to, &v, sizeof v); }

inline void store(bfloat16 *to, vec v) {  // to the nearest, ties to even
    bits wide = (bits)v;
    halves upper = __builtin_convertvector((wide + 0x7fff + (wide >> 16 & 1)) >> 16, halves);
    std::memcpy(to, &upper, sizeof upper);
}

// The same for the end of a row, of which only `left` numbers are there; the others read as zeros.
template <typename T>
inline vec load(const T *from, int64_t left) {
    if (left >= LANES) return load(from);
    T padded[LANES] = {};
    for (int64_t i = 0; i < left; i++) padded[i] = from[i];
    return load(padded);
}

template <typename T>
inline void store(T *to, vec v, int64_t left) {
    if (left >= LANES) return store(to, v);
    T padded[LANES];
    store(padded, v);
    for (int64_t i = 0; i < left; i++) to[i] = padded[i];
}

inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < LANES; i++) total += v[i];
    return total;
}

inline float largest(vec v) {
    float found = v[0];
    for (int i = 1; i < LANES; i++) found = std::max(found, v[i]);
    return found;
}

// The numbers at even or at odd places of two vectors that are laid side by side.
#if defined(__AVX512F__)
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#elif defined(__AVX__)
#define EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ODD 1, 3, 5, 7, 9, 11, 13, 15
#else
#define EVEN 0, 2, 4, 6
#define ODD 1, 3, 5, 7
#endif
#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, ints{__VA_ARGS__})
#endif

// The sum of each of LANES vectors: neighbours are added until one vector is left.
template <int N = LANES>
inline vec sums_of(const vec *of) {
    if constexpr (N == 1) {
        return of[0];
    } else {
        vec half[N / 2];
        for (int i = 0; i < N / 2; i++) {
            const vec a = of[2 * i], b = of[2 * i + 1];
            half[i] = PICK(a, b, EVEN) + PICK(a, b, ODD);
        }
        return sums_of<N / 2>(half);
    }
}

// exp by 2^x = 2^n * 2^f with |f| <= 1/2: n goes into the exponent's bits, 2^f is a polynomial.
// Measured over its range, its error is at most 1.4e-6 of the value, and 2.8e-7 for |x| < 5. Below
// -87 it is 0.
inline vec exp(vec x) {
    const vec t = (x > 88.0f ? vec{} + 88.0f : x) * 1.44269504f;
    const vec shifted = t + 12582912.0f;  // 1.5 * 2^23: what it is added to loses its fraction
    const vec n = shifted - 12582912.0f, f = (t - n) * 0.693147181f;
    const vec p = 1 + f * (1 + f * (0.5f + f * (0.166666667f + f * (0.0416666667f +
                  f * (0.00833333333f + f * 0.00138888889f)))));
    const vec power = (vec)((__builtin_convertvector(n, ints) + 127) << 23);
    return x < -87.0f ? vec{} : p * power;
}

inline vec silu(vec x) { return x / (1 + exp(-x)); }

// 1 / sqrt(mean of squares + eps) of a row.
template <typename T>
inline float inverse_rms(const T *row, int64_t size, float eps) {
    vec squares = {};
    for (int64_t i = 0; i < size; i += LANES) {
        const vec x = load(row + i, size - i);
        squares += x * x;
    }
    return 1 / std::sqrt(sum(squares) / float(size) + eps);
}

// What a matrix product multiplies at a time: one float, or two neighbouring bfloat16. `units` are
// LANES of them.
template <typename T> struct Unit;

template <> struct Unit<float> {
    typedef vec units;
    static constexpr int SIZE = 1;
    static units broadcast(const float *one) { return (vec){} + *one; }
    static vec multiply_add(vec total, units a, units b) { return total + a * b; }
};

template <> struct Unit<bfloat16> {
    typedef bits units;
    static constexpr int SIZE = 2;
    static units broadcast(const bfloat16 *two) {
        uint32_t pair;
        std::memcpy(&pair, two, sizeof pair);
        return (bits){} + pair;
    }
    static vec multiply_add(vec total, units a, units b) {
#ifdef __AVX512BF16__
        return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
#else
        total += (vec)(a << 16) * (vec)(b << 16);
        return total + (vec)(a & 0xffff0000u) * (vec)(b & 0xffff0000u);
#endif
    }
};

template <typename T>
inline typename Unit<T>::units load_units(const T *from) {
    typename Unit<T>::units units;
    std::memcpy(&units, from, sizeof units);
    return units;
}

}  // namespace
