// Vectors of floats, and the products of a step. Included by decode.cpp only.
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
typedef uint16_t hvec __attribute__((vector_size(LANES * 2)));

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
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
    p->bits = (bits & 0x7fffffff) > 0x7f800000 ? (uint16_t)((bits >> 16) | 0x40) : (uint16_t)rounded;
}
static inline vec load(const float *p) { return peek<vec>(p); }
static inline vec load(const bf16 *p) { return (vec)(__builtin_convertvector(peek<hvec>(p), uvec) << 16); }
static inline void store(float *p, vec x) { std::memcpy(p, &x, sizeof x); }
static inline void store(bf16 *p, vec x) {
    uvec bits = (uvec)x;
    uvec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    hvec half = __builtin_convertvector((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded, hvec);
    std::memcpy(p, &half, sizeof half);
}

// ---- elementwise; written without branches so that loops over them vectorise

// exp to about 1e-7 relative, clamped to the range of normal numbers; NaN stays NaN (Cephes' polynomial).
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

// ---- products: y[m, n] = sum_k x[m, k] w[n, k]
//
// Weights are read as they lie, so they need no second copy. A batch is cut into tiles of 1, 2, 4 ... WIDE requests. The
// lanes of a vector are the tile's requests, times as many consecutive k (GROUP) as then fit: the weights of those k are
// broadcast to all requests, and the lanes of a request summed at the end.

constexpr int ROWS = 8, WIDE = LANES == 16 ? 2 * LANES : LANES;

// Weights go in words of four bytes: one float32, or two bfloat16 that one instruction each makes into float32.
template <class W> constexpr int PER_WORD = 4 / sizeof(W);

// `GROUP` words from p, repeated over the lanes.
template <int GROUP> static inline uvec broadcast(const void *p) {
    if constexpr (GROUP == LANES) return peek<uvec>(p);
    if constexpr (GROUP == 1) return peek<uint32_t>(p) - uvec{};
#if defined(__AVX512DQ__)
    if constexpr (GROUP == 8) return (uvec)_mm512_broadcast_f32x8(_mm256_loadu_ps((const float *)p));
    if constexpr (GROUP == 4) return (uvec)_mm512_broadcast_f32x4(_mm_loadu_ps((const float *)p));
#endif
    typedef uint64_t pairs __attribute__((vector_size(sizeof(uvec))));
    if constexpr (GROUP == 2) return (uvec)(peek<uint64_t>(p) - pairs{});
    uvec result;
    for (int i = 0; i < LANES; i += GROUP) std::memcpy((uint32_t *)&result + i, p, GROUP * 4);
    return result;
}

// Adds up each GROUP of neighbouring lanes.
template <int GROUP> static inline vec sum_groups(vec x) {
    for (int step = 1; step < GROUP; step *= 2) {
        uvec other = {};
        for (int i = 0; i < LANES; i++) other[i] = i ^ step;
        x += __builtin_shuffle(x, other);
    }
    return x;
}

template <int VECTORS> static inline void multiply(vec *sum, const vec *x, uvec word, const float *) {
    for (int v = 0; v < VECTORS; v++) sum[v] += x[v] * (vec)word;
}
template <int VECTORS> static inline void multiply(vec *sum, const vec *x, uvec word, const bf16 *) {
    for (int v = 0; v < VECTORS; v++) sum[v] += x[v] * (vec)(word << 16);
    for (int v = 0; v < VECTORS; v++) sum[v] += x[VECTORS + v] * (vec)(word & 0xffff0000u);
}

// WIDTH requests, x as `arrange` left it, times ROWS rows of w.
template <int WIDTH, class W>
static inline void tile(const float *x, int64_t depth, const W *w, float *y, int64_t stride) {
    constexpr int GROUP = WIDTH < LANES ? LANES / WIDTH : 1, VECTORS = WIDTH < LANES ? 1 : WIDTH / LANES;
    constexpr int PARTS = VECTORS * PER_WORD<W>, STEP = GROUP * PER_WORD<W>;
    constexpr int BYTES = ROWS * GROUP * 4;
    // The next rows, in order of address: ROWS streams at once, as the sums read them, is what prefetchers can't follow.
    const char *next = (const char *)(w + ROWS * depth);
    vec sum[ROWS][VECTORS] = {};
    int64_t k = 0;
    for (; k + STEP <= depth; k += STEP, x += PARTS * LANES, next += BYTES) {
#pragma GCC unroll 8
        for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(next + i);
        vec a[PARTS];
#pragma GCC unroll 4
        for (int i = 0; i < PARTS; i++) a[i] = load(x + i * LANES);
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) multiply<VECTORS>(sum[n], a, broadcast<GROUP>(w + n * depth + k), w);
    }
    if (k < depth) {
        vec a[PARTS];
        for (int i = 0; i < PARTS; i++) a[i] = load(x + i * LANES);
        for (int n = 0; n < ROWS; n++) {
            W rest[STEP] = {};
            std::memcpy(rest, w + n * depth + k, (depth - k) * sizeof(W));
            multiply<VECTORS>(sum[n], a, broadcast<GROUP>(rest), w);
        }
    }
#pragma GCC unroll 8
    for (int n = 0; n < ROWS; n++)
        for (int v = 0; v < VECTORS; v++) sum[n][v] = sum_groups<GROUP>(sum[n][v]);
    for (int m = 0; m < WIDTH; m++)
        for (int n = 0; n < ROWS; n++) y[m * stride + n] = ((const float *)sum[n])[m * GROUP];
}

static inline int64_t tile_width(int64_t left) {
    int64_t width = WIDE;
    while (width > left) width /= 2;
    return width;
}

// x[batch][depth] in the order in which tiles read it, zeros after the last k. Called by one thread.
template <class W> static void arrange(const float *x, int64_t batch, int64_t depth, float *out) {
    constexpr int64_t P = PER_WORD<W>;
    for (int64_t m = 0, width; m < batch; m += width) {
        width = tile_width(batch - m);
        int64_t group = width < LANES ? LANES / width : 1, step = group * P, padded = (depth + step - 1) / step * step;
        for (int64_t k0 = 0; k0 < padded; k0 += step)
            for (int64_t i = 0; i < width; i++)
                for (int64_t k = k0; k < k0 + step; k++) {
                    int64_t at = k - k0;
                    out[k0 * width + (at % P * width + i) * group + at / P] = k < depth ? x[(m + i) * depth + k] : 0;
                }
        out += padded * width;
    }
}

// x as `arrange` left it. Called by every thread of a team.
template <class W>
static void product(const float *x, int64_t batch, int64_t depth, const W *w, int64_t rows, float *y) {
    constexpr int64_t P = PER_WORD<W>;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; n += ROWS) {
        // The last block reaches back over rows of the one before it.
        int64_t first = n + ROWS <= rows ? n : rows - ROWS;
        const W *block = w + first * depth;
        const float *from = x;
        for (int64_t m = 0, width; m < batch; m += width) {
            width = tile_width(batch - m);
            float *to = y + m * rows + first;
            switch (width) {
            case 1: tile<1>(from, depth, block, to, rows); break;
            case 2: tile<2>(from, depth, block, to, rows); break;
            case 4: tile<4>(from, depth, block, to, rows); break;
            case 8: if constexpr (WIDE >= 8) tile<8>(from, depth, block, to, rows); break;
            case 16: if constexpr (WIDE >= 16) tile<16>(from, depth, block, to, rows); break;
            case 32: if constexpr (WIDE >= 32) tile<32>(from, depth, block, to, rows); break;
            }
            int64_t group = width < LANES ? LANES / width : 1, step = group * P;
            from += (depth + step - 1) / step * step * width;
        }
    }
}
