// Products of activations and weights: y[m, n] = sum_k x[m, k] w[n, k].
//
// Weights are read as they lie, so they need no second copy. A batch is cut into tiles of 1, 2, 4 ... WIDE rows of x.
//
// A narrow tile is bound by memory: its lanes are its rows, times as many consecutive words (GROUP) as then fit; the
// weights of those words are broadcast to all rows, and the lanes of a row summed at the end. A wide tile is bound by
// arithmetic: its lanes are rows of x, and the weights that all wide tiles of a batch are multiplied by are first
// copied, in the form in which they are multiplied, to where they are at hand.
#pragma once

#include <algorithm>
#include <type_traits>
#include <utility>

#include "products_amx.h"
#include "vectors.h"

#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
constexpr bool MULTIPLIES_BF16 = true;
#else
constexpr bool MULTIPLIES_BF16 = false;
#endif

// Rows of w in a narrow tile, and rows of x in the widest one.
constexpr int ROWS = 8, WIDE = 2 * LANES;
// Rows of w in a wide tile of so many vectors: as many sums as registers hold.
constexpr int wide_rows(int vectors) { return LANES == 16 || vectors == 1 ? 12 : 6; }
// Rows of w that are worked on together: whole tiles of all kinds, or what the matrix unit takes at a time.
constexpr int STRIP = HAS_MATRIX_UNIT ? 32 : 24;
// Words of a row of w that are copied at a time: for batches of few tiles as many as the second-level cache holds, for
// others so many that those of x stay there as well.
constexpr int64_t LONG_PANEL = 2048, SHORT_PANEL = 512;

// x and w go in words of four bytes: one float32 each, or, with bfloat16 weights, two bfloat16 each.
template <class W> constexpr int PER_WORD = 4 / sizeof(W);
template <class W> static inline int64_t words(int64_t depth) { return (depth + PER_WORD<W> - 1) / PER_WORD<W>; }
// What wide tiles multiply.
template <class W> using Wide = std::conditional_t<MULTIPLIES_BF16, W, float>;
// Rows of x in the largest narrow tile: those of a whole vector where they can be multiplied by weights as they lie.
template <class W> constexpr int NARROW = std::is_same_v<W, Wide<W>> ? LANES : LANES / 2;

static inline int64_t whole_vectors(int64_t n) { return round_up(n, LANES); }

// How many floats a row of x takes once it is arranged, at most and for weights of a type.
static inline int64_t arranged_size(int64_t depth) { return whole_vectors(depth); }
template <class W> static inline int64_t arranged_row(int64_t depth) { return whole_vectors(words<Wide<W>>(depth)); }

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

// Reads LANES words of a row that has `left` more numbers; zeros follow those. Where weights are bfloat16, so is what
// is multiplied by them, also in the words of a float32 each that wide tiles may take.
template <class W, class Word> static inline uvec read_words(const float *x, int64_t left) {
    constexpr int NUMBERS = LANES * PER_WORD<Word>;
    float padded[NUMBERS];
    if (left < NUMBERS) {
        for (int i = 0; i < NUMBERS; i++) padded[i] = i < left ? x[i] : 0.0f;
        x = padded;
    }
    if constexpr (std::is_same_v<W, float>) return peek<uvec>(x);
    bf16 halves[NUMBERS];
    for (int i = 0; i < NUMBERS; i += LANES) store(halves + i, load(x + i));
    if constexpr (std::is_same_v<Word, float>)
        return (uvec)load(halves);
    else
        return peek<uvec>(halves);
}

// Copies one tile of rows, row(i) [depth] each, in the order in which it is multiplied by weights in W.
template <int WIDTH, class W, class Row> static void arrange_tile(Row row, int64_t depth, float *out) {
    using Word = std::conditional_t<(WIDTH <= NARROW<W>), W, Wide<W>>;
    const int64_t size = whole_vectors(words<Word>(depth));
    for (int64_t k = 0; k < size; k += LANES) {
        const int64_t at = k * PER_WORD<Word>, left = depth - at;
        if constexpr (WIDTH < LANES) {
            constexpr int GROUP = LANES / WIDTH;
            for (int i = 0; i < WIDTH; i++) {
                uvec from = read_words<W, Word>(row(i) + at, left);
                for (int j = 0; j < WIDTH; j++)
                    std::memcpy(out + k * WIDTH + j * LANES + i * GROUP, (float *)&from + j * GROUP, GROUP * 4);
            }
        } else
            for (int i = 0; i < WIDTH; i += LANES) {
                vec square[LANES];
                for (int j = 0; j < LANES; j++) square[j] = (vec)read_words<W, Word>(row(i + j) + at, left);
                transpose<LANES>(square);
                for (int j = 0; j < LANES; j++) store(out + (k + j) * WIDTH + i, square[j]);
            }
    }
}

// Arranges x[batch][depth] as `product` reads it, in `batch` rows of arranged_row. Every thread of a team calls it.
template <class W> static void arrange(const float *x, int64_t batch, int64_t depth, float *out) {
#pragma omp for schedule(static)
    for (int64_t first = 0; first < batch; first += WIDE)
        for_tiles(first, std::min(batch, first + WIDE), [&](int64_t m, auto width) {
            arrange_tile<width, W>([&](int i) { return x + (m + i) * depth; }, depth, out + m * arranged_row<W>(depth));
        });
}

// Reads `GROUP` words from p, repeated over the lanes.
template <int GROUP> static inline uvec broadcast(const void *p) {
    if constexpr (GROUP == LANES) return peek<uvec>(p);
    if constexpr (GROUP == 1) return peek<uint32_t>(p) - uvec{};
#if defined(__AVX512DQ__)
    if constexpr (GROUP == 8) return (uvec)_mm512_broadcast_f32x8(_mm256_loadu_ps((const float *)p));
    if constexpr (GROUP == 4) return (uvec)_mm512_broadcast_f32x4(_mm_loadu_ps((const float *)p));
#elif defined(__AVX__)
    if constexpr (GROUP == 4) return (uvec)_mm256_broadcast_ps((const __m128 *)p);
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

// ---- narrow tiles

// Multiplies WIDTH rows of x, as `arrange` left them, by ROWS rows of w. It is not inlined, so that registers hold all
// sums.
template <int WIDTH, class W>
[[gnu::noinline]] static void narrow_tile(const float *x, int64_t depth, const W *w, float *y, int64_t stride) {
    constexpr int GROUP = LANES / WIDTH, STEP = GROUP * PER_WORD<W>, BYTES = ROWS * GROUP * 4;
    // The next rows, in order of address: ROWS streams at once, as the sums read them, is what prefetchers can't
    // follow.
    const char *next = (const char *)(w + ROWS * depth);
    vec sum[ROWS] = {};
    int64_t k = 0;
    for (; k + STEP <= depth; k += STEP, x += LANES, next += BYTES) {
#pragma GCC unroll 8
        for (int i = 0; i < BYTES; i += 64) __builtin_prefetch(next + i);
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) sum[n] = multiply(sum[n], peek<uvec>(x), broadcast<GROUP>(w + n * depth + k), w);
    }
    // Unrolled as well: sums that a variable indexes would live in memory, not in registers.
    if (k < depth)
#pragma GCC unroll 8
        for (int n = 0; n < ROWS; n++) {
            W rest[STEP] = {};
            std::memcpy(rest, w + n * depth + k, (depth - k) * sizeof(W));
            sum[n] = multiply(sum[n], peek<uvec>(x), broadcast<GROUP>(rest), w);
        }
#pragma GCC unroll 8
    for (int n = 0; n < ROWS; n++) sum[n] = sum_groups<GROUP>(sum[n]);
    transpose<ROWS>(sum);
    for (int m = 0; m < WIDTH; m++)
        std::memcpy(y + m * stride, (const float *)sum + m * GROUP * ROWS, ROWS * sizeof(float));
}

// ---- wide tiles

// Some rows of w, a panel of each, as wide tiles read them. A row has a cache line more than its words: rows of 2^n
// bytes would share cache sets.
constexpr int64_t PANEL_ROW = LONG_PANEL + 16;

// Copies `count` words of each of `rows` rows of w, which have `left` numbers.
template <class W>
static inline void copy_panel(const W *w, int64_t depth, int64_t left, int rows, int64_t count, float *panel) {
    for (int n = 0; n < rows; n++, w += depth, panel += PANEL_ROW) {
        if constexpr (std::is_same_v<W, Wide<W>>) {
            panel[count - 1] = 0; // the second half of an odd row's last word
            std::memcpy(panel, w, std::min<int64_t>(left, count * PER_WORD<W>) * sizeof(W));
        } else {
            int64_t k = 0;
            for (; k + LANES <= count; k += LANES) store(panel + k, load(w + k));
            for (; k < count; k++) panel[k] = read(w + k);
        }
    }
}

// Multiplies a tile of x by R rows of w, `count` words of each, and writes the first `rows` columns of y, or adds to
// them. With PREFETCH it calls for what lies at `next`, `step` bytes for each word.
template <int VECTORS, int R, bool PREFETCH, class W>
[[gnu::noinline]] static void wide_tile(const float *x, int64_t count, const float *panel, int rows, bool add, float *y,
                                        int64_t stride, const char *next, int step) {
    vec sum[VECTORS][R] = {};
    for (int64_t k = 0; k < count; k++, x += VECTORS * LANES) {
        if constexpr (PREFETCH) __builtin_prefetch(next + k * step);
        uvec value[VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) value[v] = peek<uvec>(x + v * LANES);
#pragma GCC unroll 12
        for (int n = 0; n < R; n++) {
            const uvec word = broadcast<1>(panel + n * PANEL_ROW + k);
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sum[v][n] = multiply(sum[v][n], value[v], word, (const Wide<W> *)nullptr);
        }
    }
    // From lanes of rows of x to rows, ROWS columns at a time.
#pragma GCC unroll 2
    for (int v = 0; v < VECTORS; v++)
#pragma GCC unroll 2
        for (int n = 0; n < R; n += ROWS) {
            vec square[ROWS] = {};
#pragma GCC unroll 8
            for (int i = 0; i < ROWS; i++)
                if (n + i < R) square[i] = sum[v][n + i];
            transpose<ROWS>(square);
            const int columns = std::min(std::min(ROWS, R - n), rows - n);
            for (int m = 0; m < LANES; m++) {
                const float *from = (const float *)square + m * ROWS;
                float *to = y + (v * LANES + m) * stride + n;
                for (int i = 0; i < columns; i++) to[i] = add ? to[i] + from[i] : from[i];
            }
        }
}

// Multiplies `batch` rows of x, in tiles of VECTORS vectors, by rows `from` to `to` of w, `count` words from `first`
// on.
template <int VECTORS, class W>
static void multiply_panel(const float *x, int64_t x_row, int64_t batch, int64_t depth, int64_t first, int64_t count,
                           const W *w, int64_t from, int64_t to, float *y, int64_t stride) {
    constexpr int WIDTH = VECTORS * LANES, R = wide_rows(VECTORS), NUMBERS = PER_WORD<Wide<W>>;
    alignas(64) float panel[R * PANEL_ROW];
    for (int64_t n = from; n < to; n += R) {
        const int rows = std::min<int64_t>(R, to - n), step = R * NUMBERS * sizeof(W);
        copy_panel(w + n * depth + first * NUMBERS, depth, depth - first * NUMBERS, rows, count, panel);
        const char *const next = (const char *)(w + (n + R) * depth) + first * step;
        for (int64_t m = 0; m < batch; m += WIDTH) {
            auto run = m ? wide_tile<VECTORS, R, false, W> : wide_tile<VECTORS, R, true, W>;
            run(x + m * x_row + first * WIDTH, count, panel, rows, first, y + m * stride + n, stride, next, step);
        }
    }
}

// ---- whole products

// Multiplies x, as `arrange` left it, by rows `from` to `to` of w [rows][depth]; rows of y are `stride` apart. There
// are ROWS rows or more; narrow tiles write some of the STRIP before `from` or behind `to` once more.
template <class W>
static void product_rows(const float *x, int64_t batch, int64_t depth, const W *w, int64_t rows, int64_t from,
                         int64_t to, float *y, int64_t stride) {
    if constexpr (HAS_MATRIX_UNIT && std::is_same_v<W, bf16>) {
        const int64_t done = product_on_matrix_unit(x, batch, depth, w, rows, from, to, y, stride);
        x += done * arranged_row<W>(depth), y += done * stride, batch -= done;
    }
    const int64_t size = arranged_row<W>(depth), all = words<Wide<W>>(depth), widest = batch / WIDE * WIDE,
                  narrow = NARROW<W> < LANES ? batch / LANES * LANES : widest,
                  most = batch > 2 * WIDE ? SHORT_PANEL : LONG_PANEL;
    for (int64_t n = from; n < to; n += STRIP) {
        const int64_t end = std::min(n + STRIP, to);
        for (int64_t first = 0; narrow && first < all; first += most) {
            const int64_t count = std::min(most, all - first);
            if (widest) multiply_panel<2>(x, size, widest, depth, first, count, w, n, end, y, stride);
            if constexpr (NARROW<W> < LANES)
                if (narrow > widest)
                    multiply_panel<1>(x + widest * size, size, narrow - widest, depth, first, count, w, n, end,
                                      y + widest * stride, stride);
        }
        for_tiles(narrow, batch, [&](int64_t m, auto width) {
            if constexpr (width <= NARROW<W>)
                for (int64_t i = n; i < end; i += ROWS) {
                    const int64_t at = std::min(i, rows - ROWS);
                    narrow_tile<width>(x + m * size, depth, w + at * depth, y + m * stride + at, stride);
                }
        });
    }
}

// Multiplies x, as `arrange` left it, by w. Every thread of a team calls it.
template <class W>
static void product(const float *x, int64_t batch, int64_t depth, const W *w, int64_t rows, float *y) {
    const int64_t step = batch < (HAS_MATRIX_UNIT ? LANES : NARROW<W> + 1) ? ROWS : STRIP;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < rows; n += step)
        product_rows(x, batch, depth, w, rows, n, std::min(n + step, rows), y, rows);
}

// Multiplies x by w; `arranged` has room for `batch` rows of arranged_size. Every thread of a team calls it.
template <class W>
static void linear(const float *x, int64_t batch, int64_t depth, const void *w, int64_t rows, float *arranged,
                   float *y) {
    arrange<W>(x, batch, depth, arranged);
    product(arranged, batch, depth, (const W *)w, rows, y);
}
