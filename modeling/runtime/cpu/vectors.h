// Vectors of floats: loads, stores, transposition, and functions that loops over them can vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __SSE__
#include <immintrin.h>
#endif

#if defined(__AVX512DQ__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

struct bf16 {
    uint16_t bits;
};
typedef float vec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));
typedef int8_t bvec __attribute__((vector_size(LANES)));

// ---- loads and stores

template <class T> static inline T peek(const void *p) {
    T x;
    std::memcpy(&x, p, sizeof x);
    return x;
}
static inline float read(const float *p) { return *p; }
static inline float read(const bf16 *p) {
    uint32_t bits = (uint32_t)p->bits << 16;
    return peek<float>(&bits);
}
static inline void write(float *p, float x) { *p = x; }
static inline void write(bf16 *p, float x) {
    uint32_t bits = peek<uint32_t>(&x);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest even
    p->bits = (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)rounded;
}
static inline vec load(const float *p) { return peek<vec>(p); }
static inline void store(float *p, vec x) { std::memcpy(p, &x, sizeof x); }

// Changes of width. GCC 12 takes the elements of its own vectors apart one by one for these, hence the instructions.
static inline uvec widen(hvec x) {
#if defined(__AVX512DQ__)
    return (uvec)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (uvec)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, uvec);
#endif
}
static inline hvec narrow_to_16(uvec x) {
#if defined(__AVX512DQ__)
    return (hvec)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, hvec);
#endif
}
static inline ivec widen(bvec x) {
#if defined(__AVX512DQ__)
    return (ivec)_mm512_cvtepi8_epi32((__m128i)x);
#elif defined(__AVX2__)
    return (ivec)_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(peek<int64_t>(&x)));
#else
    return __builtin_convertvector(x, ivec);
#endif
}
static inline bvec narrow_to_8(uvec x) {
#if defined(__AVX512DQ__)
    return (bvec)_mm512_cvtepi32_epi8((__m512i)x);
#else
    return __builtin_convertvector(x, bvec);
#endif
}

static inline vec load(const bf16 *p) { return (vec)(widen(peek<hvec>(p)) << 16); }
static inline void store(bf16 *p, vec x) {
#if defined(__AVX512BF16__) // it takes denormals as zero, as all of a step does
    const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
#else
    const uvec bits = (uvec)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16; // to nearest even
    const hvec half = narrow_to_16((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded);
#endif
    std::memcpy(p, &half, sizeof half);
}
static inline vec load(const int8_t *p) { return __builtin_convertvector(widen(peek<bvec>(p)), vec); }

// sum + a b, rounded once where the CPU can. Of sum + a * b compilers make one rounding in some loops and two in
// others, so that an element's bits would depend on what is computed beside it.
static inline vec multiply_add(vec sum, vec a, vec b) {
#if defined(__AVX512DQ__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX__) && defined(__FMA__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return sum + a * b;
#endif
}
static inline float multiply_add(float sum, float a, float b) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, sum);
#else
    return sum + a * b;
#endif
}

// N vectors, a matrix [N][LANES], become [LANES][N], in as many vectors. Each round interleaves the halves of the
// whole.
template <int N> static inline void transpose(vec *x) {
    static constexpr auto lanes = [](int from) {
        uvec at = {};
        for (int i = 0; i < LANES; i++) at[i] = from + i / 2 + i % 2 * LANES;
        return at;
    };
    for (int round = 1; round < N; round *= 2) {
        vec y[N];
#pragma GCC unroll 8
        for (int i = 0; i < N / 2; i++) {
            y[2 * i] = __builtin_shuffle(x[i], x[i + N / 2], lanes(0));
            y[2 * i + 1] = __builtin_shuffle(x[i], x[i + N / 2], lanes(LANES / 2));
        }
#pragma GCC unroll 16
        for (int i = 0; i < N; i++) x[i] = y[i];
    }
}

// ---- elementwise; written without branches so that loops over them vectorise

// The exponential, to about 1e-7 relative, clamped to the range of normal numbers; NaN stays NaN (Cephes' polynomial).
static inline float exp32(float x) {
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    float n = __builtin_rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t scale = ((int32_t)n + 127) << 23;
    return p * __builtin_bit_cast(float, scale);
}
static inline float sigmoid(float x) { return 1.0f / (1.0f + exp32(-x)); }
static inline float silu(float x) { return x / (1.0f + exp32(-x)); }

static inline float sum_of_squares(const float *x, int n) {
    float s = 0;
#pragma omp simd reduction(+ : s)
    for (int i = 0; i < n; i++) s += x[i] * x[i];
    return s;
}

// ---- memory

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Cuts a block of memory into parts, each beginning at a cache line; without a block it counts what would be used.
struct Carver {
    float *base;
    int64_t used = 0;

    float *take(int64_t floats) {
        float *part = base ? base + used : nullptr;
        used += round_up(floats, 16);
        return part;
    }
};
