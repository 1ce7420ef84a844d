// Products of bfloat16 on a CPU's matrix unit (AMX): 16 rows of w by 16 rows of x, 32 numbers of each at a time.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <atomic>

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512DQ__)
#include <sys/syscall.h>
#include <unistd.h>

constexpr bool HAS_MATRIX_UNIT = true;

// Rows of a tile, of w or of x, and numbers of a row.
constexpr int TILE = 16, TILE_DEPTH = 32;

// Whether the kernel lets this process use the unit; it wants to be asked, once.
static inline bool may_use_matrix_unit() {
    constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted;
}

// The unit's registers are this thread's, all of them whole tiles, for as long as it is there.
struct MatrixUnit {
    struct alignas(64) Shapes {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {TILE, TILE, TILE, TILE, TILE, TILE, TILE, TILE};
    };
    MatrixUnit() {
        static constexpr Shapes shapes;
        _tile_loadconfig(&shapes);
        // GCC 12 is not told that loads of tiles read memory: what was written to it before must be there by now.
        std::atomic_signal_fence(std::memory_order_seq_cst);
    }
    ~MatrixUnit() { _tile_release(); }
};

// Sums of one tile, [rows of w][rows of x].
struct alignas(64) Sums {
    float data[TILE * TILE];

    // Writes them to y, which has a row for each row of x.
    void write(float *y, int64_t stride) const {
        vec square[TILE];
        for (int n = 0; n < TILE; n++) square[n] = load(data + n * TILE);
        transpose<TILE>(square);
        for (int m = 0; m < TILE; m++) store(y + m * stride, square[m]);
    }
};

// Multiplies W tiles of rows of w, as they lie, by X tiles of rows of x, as `arrange_tile` left them: of each word all
// rows, one after the other. With PREFETCH it calls for the rows of w behind these, in order of address.
template <int W, int X, bool PREFETCH>
static void multiply_tiles(const float *x, int64_t depth, const bf16 *w, float *y, int64_t stride) {
    constexpr int x_row = X * TILE * sizeof(float), prefetched = W * TILE * TILE_DEPTH * sizeof(bf16);
    const int64_t w_row = depth * sizeof(bf16);
    const char *next = (const char *)(w + W * TILE * depth);
    _tile_zero(0);
    if constexpr (X > 1) _tile_zero(1);
    if constexpr (W > 1) _tile_zero(2);
    if constexpr (W > 1 && X > 1) _tile_zero(3);
    for (int64_t k = 0; k < depth; k += TILE_DEPTH, x += X * TILE * TILE, next += prefetched) {
        if constexpr (PREFETCH)
            for (int i = 0; i < prefetched; i += 64) __builtin_prefetch(next + i, 0, 2);
        _tile_loadd(4, w + k, w_row);
        _tile_loadd(6, x, x_row);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (X > 1) {
            _tile_loadd(7, x + TILE, x_row);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (W > 1) {
            _tile_loadd(5, w + TILE * depth + k, w_row);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (X > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    // The intrinsics want the registers' numbers as they are written.
    Sums sums;
    _tile_stored(0, sums.data, TILE * sizeof(float));
    sums.write(y, stride);
    if constexpr (X > 1) {
        _tile_stored(1, sums.data, TILE * sizeof(float));
        sums.write(y + TILE * stride, stride);
    }
    if constexpr (W > 1) {
        _tile_stored(2, sums.data, TILE * sizeof(float));
        sums.write(y + TILE, stride);
    }
    if constexpr (W > 1 && X > 1) {
        _tile_stored(3, sums.data, TILE * sizeof(float));
        sums.write(y + TILE * stride + TILE, stride);
    }
}

// Multiplies W tiles of rows of w by all whole tiles of `batch` rows of x.
template <int W>
static void multiply_all(const float *x, int64_t batch, int64_t depth, const bf16 *w, float *y, int64_t stride) {
    const int64_t x_row = depth / 2; // in words
    for (int64_t m = 0; m + TILE <= batch; m += 2 * TILE) {
        auto run = m + 2 * TILE <= batch ? m ? multiply_tiles<W, 2, false> : multiply_tiles<W, 2, true>
                   : m                   ? multiply_tiles<W, 1, false>
                                         : multiply_tiles<W, 1, true>;
        run(x + m * x_row, depth, w, y + m * stride, stride);
    }
}

// Multiplies all whole tiles of `batch` rows of x by rows `from` to `to` of w [rows][depth], if the unit can. It writes
// some columns of y before `from` or behind `to` once more. Returns how many rows of x that are.
static int64_t product_on_matrix_unit(const float *x, int64_t batch, int64_t depth, const bf16 *w, int64_t rows,
                                      int64_t from, int64_t to, float *y, int64_t stride) {
    if (batch < TILE || rows < TILE || depth % TILE_DEPTH || !may_use_matrix_unit()) return 0;
    MatrixUnit unit;
    for (int64_t n = from; n < to;) {
        if (n + TILE < to && n + 2 * TILE <= rows) {
            multiply_all<2>(x, batch, depth, w + n * depth, y + n, stride);
            n += 2 * TILE;
        } else {
            const int64_t at = std::min(n, rows - TILE);
            multiply_all<1>(x, batch, depth, w + at * depth, y + at, stride);
            n += TILE;
        }
    }
    return batch / TILE * TILE;
}

#else

constexpr bool HAS_MATRIX_UNIT = false;

template <class... Arguments> static int64_t product_on_matrix_unit(Arguments...) { return 0; }

#endif
