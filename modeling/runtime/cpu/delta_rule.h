// The gated delta rule, CHUNK tokens at a time (arXiv 2412.06464, section 3.3), one key head and its value heads.
//
// With G the running sum of the log decays of a chunk, S the state before it and R[i][j] = exp(G[i] - G[j]):
//     U = (I + strictly lower part of beta (K K^T) R)^-1 beta (V - exp(G) K S)
//     O = exp(G) Q S + (lower part of (Q K^T) R) U
//     S' = exp(G[last]) S + K^T (exp(G[last] - G) U)
// Tokens and channels are padded with zeros to whole blocks: such a token reads nothing, writes nothing, decays
// nothing.
#pragma once

#include "vectors.h"

#include <algorithm>
#include <cstddef>
#include <utility>

constexpr int CHUNK = 32, BLOCK_ROWS = 8, PADDING = LANES > BLOCK_ROWS ? LANES : BLOCK_ROWS;

// ---- small products: vectors along the columns of b, elements of a broadcast

// Computes c = scale c + a b, or with FRESH c = a b, for BLOCK_ROWS rows and VECTORS vectors of columns of c.
template <int VECTORS, bool FRESH>
static inline void product_block(const float *a, int64_t a_row, const float *b, int64_t b_row, int depth, float scale,
                                 float *c, int64_t c_row) {
    vec sum[BLOCK_ROWS][VECTORS] = {};
    if (!FRESH)
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK_ROWS; i++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sum[i][v] = load(c + i * c_row + v * LANES) * scale;
    for (int k = 0; k < depth; k++)
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK_ROWS; i++)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; v++) sum[i][v] += load(b + k * b_row + v * LANES) * a[i * a_row + k];
#pragma GCC unroll 8
    for (int i = 0; i < BLOCK_ROWS; i++)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; v++) store(c + i * c_row + v * LANES, sum[i][v]);
}

// Does the same for all rows, in whole blocks, and columns, in whole vectors. With LOWER, a has zeros above its
// diagonal.
template <bool FRESH, bool LOWER = false>
static void multiply_rows(const float *a, int64_t a_row, int rows, const float *b, int64_t b_row, int depth,
                          int64_t columns, float scale, float *c, int64_t c_row) {
    for (int64_t n = 0; n < columns; n += 2 * LANES)
        for (int r = 0; r < rows; r += BLOCK_ROWS) {
            auto run = n + 2 * LANES <= columns ? product_block<2, FRESH> : product_block<1, FRESH>;
            run(a + r * a_row, a_row, b + n, b_row, LOWER ? r + BLOCK_ROWS : depth, scale, c + r * c_row + n, c_row);
        }
}

// Computes x = (I - a)^-1 x for one vector of columns; a [rows][CHUNK] is strictly lower triangular.
static inline void solve_columns(const float *a, int rows, float *x, int64_t x_row) {
    for (int r = 0; r < rows; r += BLOCK_ROWS) {
        vec sum[BLOCK_ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK_ROWS; i++) sum[i] = load(x + (r + i) * x_row);
        for (int k = 0; k < r; k++)
#pragma GCC unroll 8
            for (int i = 0; i < BLOCK_ROWS; i++) sum[i] += load(x + k * x_row) * a[(r + i) * CHUNK + k];
#pragma GCC unroll 8
        for (int k = 0; k < BLOCK_ROWS; k++)
#pragma GCC unroll 8
            for (int i = k + 1; i < BLOCK_ROWS; i++) sum[i] += sum[k] * a[(r + i) * CHUNK + r + k];
#pragma GCC unroll 8
        for (int i = 0; i < BLOCK_ROWS; i++) store(x + (r + i) * x_row, sum[i]);
    }
}

// ---- one chunk

// The memory that a thread works on. Fill q, k (normalised, q scaled; rows of `key_row`), then `prepare`; fill v,
// log_decay and beta, then `advance`, for each value head.
struct Chunk {
    int64_t d_k, d_v, key_row, value_row; // a value row has a vector more: rows of 2^n bytes would share cache sets
    float *q, *k, *v, *o;                 // [CHUNK] rows
    float log_decay[CHUNK], beta[CHUNK];
    float *k_columns, *kk, *qk, *a, *b, *u;

    static int64_t row(int64_t d) { return round_up(d, PADDING); }
    static size_t floats(int64_t d_k, int64_t d_v) {
        return CHUNK * (3 * row(d_k) + 3 * (row(d_v) + LANES) + 4 * CHUNK);
    }
    static size_t state_floats(int64_t d_k, int64_t d_v) { return row(d_k) * (row(d_v) + LANES); }

    Chunk(int64_t d_k, int64_t d_v, float *memory)
        : d_k(d_k), d_v(d_v), key_row(row(d_k)), value_row(row(d_v) + LANES) {
        std::fill_n(memory, floats(d_k, d_v), 0.0f);
        auto take = [&](int64_t n) { return std::exchange(memory, memory + n); };
        q = take(CHUNK * key_row), k = take(CHUNK * key_row), k_columns = take(CHUNK * key_row);
        v = take(CHUNK * value_row), o = take(CHUNK * value_row), u = take(CHUNK * value_row);
        kk = take(CHUNK * CHUNK), qk = take(CHUNK * CHUNK), a = take(CHUNK * CHUNK), b = take(CHUNK * CHUNK);
    }

    // Copies a head's state [d_k][d_v] to where rows are padded, and back.
    void load_state(const float *from, float *state) const {
        std::fill_n(state, state_floats(d_k, d_v), 0.0f);
        for (int64_t i = 0; i < d_k; i++) std::memcpy(state + i * value_row, from + i * d_v, d_v * sizeof(float));
    }
    void store_state(const float *state, float *to) const {
        for (int64_t i = 0; i < d_k; i++) std::memcpy(to + i * d_v, state + i * value_row, d_v * sizeof(float));
    }

    // The products that the value heads share.
    void prepare(int tokens) {
        const int rows = round_up(tokens, PADDING);
        std::fill_n(q + tokens * key_row, (rows - tokens) * key_row, 0.0f);
        std::fill_n(k + tokens * key_row, (rows - tokens) * key_row, 0.0f);
        for (int t = 0; t < rows; t += LANES)
            for (int64_t i = 0; i < key_row; i += LANES) {
                vec square[LANES];
                for (int j = 0; j < LANES; j++) square[j] = load(k + (t + j) * key_row + i);
                transpose<LANES>(square);
                for (int j = 0; j < LANES; j++) store(k_columns + (i + j) * CHUNK + t, square[j]);
            }
        multiply_rows<true>(k, key_row, rows, k_columns, CHUNK, d_k, rows, 0, kk, CHUNK);
        multiply_rows<true>(q, key_row, rows, k_columns, CHUNK, d_k, rows, 0, qk, CHUNK);
    }

    // Computes o, and the state after the chunk.
    void advance(int tokens, float *state) {
        const int rows = round_up(tokens, PADDING);
        const int64_t columns = value_row - LANES;
        float sum[CHUNK], in[CHUNK], out[CHUNK], total = 0;
        for (int t = 0; t < rows; t++) sum[t] = total += t < tokens ? log_decay[t] : 0.0f;
        for (int t = 0; t < rows; t++) in[t] = exp32(sum[t]), out[t] = exp32(total - sum[t]);
        std::fill_n(beta + tokens, rows - tokens, 0.0f);
        std::fill_n(v + tokens * value_row, (rows - tokens) * value_row, 0.0f);

        multiply_rows<true>(k, key_row, rows, state, value_row, d_k, columns, 0, u, value_row);
        multiply_rows<true>(q, key_row, rows, state, value_row, d_k, columns, 0, o, value_row);
        for (int t = 0; t < rows; t++)
            for (int64_t i = t * value_row; i < t * value_row + columns; i++) {
                u[i] = (v[i] - u[i] * in[t]) * beta[t];
                o[i] *= in[t];
            }
        // a: -beta (K K^T) R before the diagonal, b: (Q K^T) R up to it.
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < rows; j++) {
                const float ratio = exp32(sum[i] - sum[j]);
                a[i * CHUNK + j] = j < i ? -beta[i] * ratio * kk[i * CHUNK + j] : 0.0f;
                b[i * CHUNK + j] = j <= i ? ratio * qk[i * CHUNK + j] : 0.0f;
            }
        for (int64_t i = 0; i < columns; i += LANES) solve_columns(a, rows, u + i, value_row);
        multiply_rows<false, true>(b, CHUNK, rows, u, value_row, 0, columns, 1, o, value_row);
        for (int t = 0; t < rows; t++)
            for (int64_t i = t * value_row; i < t * value_row + columns; i++) u[i] *= out[t];
        multiply_rows<false>(k_columns, CHUNK, key_row, u, value_row, rows, columns, exp32(total), state, value_row);
    }
};

// ---- whole sequences, as modeling.ops.GatedDeltaRule has them

struct Rule {
    const float *q, *k, *v, *log_decay, *beta; // as in Python; log_decay null for decay 1
    float *state, *o;                          // state [sequences, num_v_heads, d_k, d_v], in place
    const int64_t *cu_seqlens;
    int64_t sequences;
    float scale;
    int32_t num_k_heads, num_v_heads, d_k, d_v;
};

// Runs one key head of one sequence. `memory` has room for a Chunk and a state.
static void run_rule(const Rule &r, int64_t sequence, int64_t head, float *memory) {
    Chunk chunk(r.d_k, r.d_v, memory);
    float *padded = memory + Chunk::floats(r.d_k, r.d_v);
    const int64_t groups = r.num_v_heads / r.num_k_heads, from = r.cu_seqlens[sequence],
                  to = r.cu_seqlens[sequence + 1];
    for (int64_t h = head * groups; h < (head + 1) * groups; h++) {
        float *state = r.state + (sequence * r.num_v_heads + h) * r.d_k * r.d_v;
        chunk.load_state(state, padded);
        for (int64_t first = from; first < to; first += CHUNK) {
            const int tokens = std::min<int64_t>(CHUNK, to - first);
            for (int t = 0; t < tokens; t++) {
                const int64_t key = (first + t) * r.num_k_heads + head, value = (first + t) * r.num_v_heads + h;
                for (int i = 0; i < r.d_k; i++) chunk.q[t * chunk.key_row + i] = r.q[key * r.d_k + i] * r.scale;
                std::copy_n(r.k + key * r.d_k, r.d_k, chunk.k + t * chunk.key_row);
                std::copy_n(r.v + value * r.d_v, r.d_v, chunk.v + t * chunk.value_row);
                chunk.log_decay[t] = r.log_decay ? r.log_decay[value] : 0.0f;
                chunk.beta[t] = r.beta[value];
            }
            chunk.prepare(tokens);
            chunk.advance(tokens, padded);
            for (int t = 0; t < tokens; t++)
                std::copy_n(chunk.o + t * chunk.value_row, r.d_v, r.o + ((first + t) * r.num_v_heads + h) * r.d_v);
        }
        chunk.store_state(padded, state);
    }
}
