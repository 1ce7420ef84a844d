// Products of activations and weights: y[m, n] = sum_k x[m, k] w[n, k].
//
// Weights are read as they lie, so they need no second copy. A batch is cut into tiles of 1, 2, 4 ... WIDE rows of x.
// The lanes of a vector are the tile's rows, times as many consecutive words (GROUP) as then fit: the weights of those
// words are broadcast to all rows, and the lanes of a row summed at the end.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <type_traits>
#include <utility>

constexpr int ROWS = 8, WIDE = LANES == 16 ? 2 * LANES : LANES;

// x and w go in words of four bytes: one float32 each, or, with bfloat16 weights, two bfloat16 each.
template <class W> constexpr int PER_WORD = 4 / sizeof(W);
template <class W> static inline int64_t words(int64_t depth) { return (depth + PER_WORD<W> - 1) / PER_WORD<W>; }

// How many floats a row of x takes once it is arranged.
static inline int64_t arranged_size(int64_t depth) { return (depth + LANES - 1) / LANES * LANES; }

// Calls f(first, width) for each tile of rows `from` to `to`, the width as a constant.
template <class F> static inline void for_tiles(int64_t from, int64_t to, F f) {
    for (int64_t m = from, width = WIDE; m < to; m += width) {
        while (width > to - m) width /= 2;
        switch (width) {
        case 1: f(m, std::integral_constant<int, 1>()); break;
        case 2: f(m, std::integral_constant<int, 2>()); break;
        case 4: f(m, std::integral_constant<int, 4>()); break;
        case 8:
            if constexpr (WIDE >= 8) f(m, std::integral_constant<int, 8>());
            break;
        case 16:
            if constexpr (WIDE >= 16) f(m, std::integral_constant<int, 16>());
            break;
        case 32:
            if constexpr (WIDE >= 32) f(m, std::integral_constant<int, 32>());
            break;
        }
    }
}

// Reads LANES words of a row that has `left` more numbers; zeros follow those.
template <class W> static inline uvec read_words(const float *x, int64_t left) {
    constexpr int NUMBERS = LANES * PER_WORD<W>;
    float padded[NUMBERS];
    if (left < NUMBERS) {
        for (int i = 0; i < NUMBERS; i++) padded[i] = i < left ? x[i] : 0.0f;
        x = padded;
    }
    if constexpr (PER_WORD<W> == 1) return peek<uvec>(x);
    bf16 halves[NUMBERS];
    for (int i = 0; i < NUMBERS; i += LANES) store(halves + i, load(x + i));
    return peek<uvec>(halves);
}

// Copies one tile of rows, row(i) [depth] each, in the order in which `tile` reads it.
template <int WIDTH, class W, class Row> static void arrange_tile(Row row, int64_t depth, float *out) {
    const int64_t size = arranged_size(words<W>(depth));
    for (int64_t k = 0; k < size; k += LANES) {
        const int64_t at = k * PER_WORD<W>, left = depth - at;
        if constexpr (WIDTH < LANES) {
            constexpr int GROUP = LANES / WIDTH;
            for (int i = 0; i < WIDTH; i++) {
                uvec from = read_words<W>(row(i) + at, left);
                for (int j = 0; j < WIDTH; j++)
                    std::memcpy(out + k * WIDTH + j * LANES + i * GROUP, (float *)&from + j * GROUP, GROUP * 4);
            }
        } else
            for (int i = 0; i < WIDTH; i += LANES) {
                vec square[LANES];
                for (int j = 0; j < LANES; j++) square[j] = (vec)read_words<W>(row(i + j) + at, left);
                transpose<LANES>(square);
                for (int j = 0; j < LANES; j++) store(out + (k + j) * WIDTH + i, square[j]);
            }
    }
}

// Arranges x[batch][depth] as `product` reads it, in `batch` rows of arranged_size. Every thread of a team calls it.
template <class W> static void arrange(const float *x, int64_t batch, int64_t depth, float *out) {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < batch; first += WIDE)
        for_tiles(first, std::min(batch, first + WIDE), [&](int64_t m, auto width) {
            arrange_tile<width, W>([&](int i) { return x + (m + i) * depth; }, depth,
                                   out + m * arranged_size(words<W>(depth)));
        });
}

// Reads `GROUP` words from p, repeated over the lanes.
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

static inline vec multiply(vec sum, uvec x, uvec w, const float *) { return sum + (vec)x * (vec)w; }
static inline vec multiply(vec sum, uvec x, uvec w, const bf16 *) {
#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
#else
    sum += (vec)(x << 16) * (vec)(w << 16);
    return sum + (vec)(x & 0xffff0000u) * (vec)(w & 0xffff0000u);
#endif
}

// Multiplies WIDTH rows of x, as `arrange` left them, by ROWS rows of w. It is not inlined, so that registers hold all
// sums.
template <int WIDTH, class W>
[[gnu::noinline]] static void tile(const float *x, int64_t depth, const W *w, float *y, int64_t stride) {
    constexpr int GROUP = WIDTH < LANES ? LANES / WIDTH : 1, VECTORS = WIDTH < LANES ? 1 : WIDTH / LANES;
    constexpr int STEP = GROUP * PER_WORD<W>, BYTES = ROWS * GROUP * 4;
    // The next rows, in order of address: ROWS streams at once, as the sums read them, is what prefetchers can't
    // follow.
    const char *next = (const char *)(w + ROWS * depth);
    vec sum[VECTORS][ROWS] = {};
    int64_t k = 0;
    for (; k + STEP <= depth; k += STEP, x += VECTORS * LANES, next += BYTES) {
#pragma GCC unroll 8
        for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(next + i);
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) {
            uvec word = broadcast<GROUP>(w + n * depth + k);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sum[v][n] = multiply(sum[v][n], peek<uvec>(x + v * LANES), word, w);
        }
    }
    // Unrolled as well: sums that a variable indexes would live in memory, not in registers.
    if (k < depth)
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) {
            W rest[STEP] = {};
            std::memcpy(rest, w + n * depth + k, (depth - k) * sizeof(W));
            uvec word = broadcast<GROUP>(rest);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sum[v][n] = multiply(sum[v][n], peek<uvec>(x + v * LANES), word, w);
        }
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++) {
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) sum[v][n] = sum_groups<GROUP>(sum[v][n]);
        transpose<ROWS>(sum[v]);
        for (int m = 0; m < LANES / GROUP; m++)
            std::memcpy(y + (v * LANES + m) * stride, (const float *)sum[v] + m * GROUP * ROWS, ROWS * 4);
    }
}

// Multiplies x, as `arrange` left it, by ROWS rows of w [rows][depth], those from n on; the last ones reach back over
// rows of those before them.
template <class W>
static inline void product_rows(const float *x, int64_t batch, int64_t depth, const W *w, int64_t rows, int64_t n,
                                float *y) {
    const int64_t size = arranged_size(words<W>(depth)), first = std::min(n, rows - ROWS);
    for_tiles(0, batch, [&](int64_t m, auto width) {
        tile<width>(x + m * size, depth, w + first * depth, y + m * rows + first, rows);
    });
}

// Multiplies x, as `arrange` left it, by w. Every thread of a team calls it.
template <class W>
static void product(const float *x, int64_t batch, int64_t depth, const W *w, int64_t rows, float *y) {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; n += ROWS) product_rows(x, batch, depth, w, rows, n, y);
}

// Multiplies x by w; `arranged` has room for `batch` rows of arranged_size(depth). Every thread of a team calls it.
template <class W>
static void linear(const float *x, int64_t batch, int64_t depth, const void *w, int64_t rows, float *arranged,
                   float *y) {
    arrange<W>(x, batch, depth, arranged);
    product(arranged, batch, depth, (const W *)w, rows, y);
}
