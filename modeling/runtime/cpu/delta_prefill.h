// A mixer between its projections, over the tokens of packed sequences.
#pragma once

#include "delta.h"
#include "delta_rule.h"

// The convolution and SiLU of n neighbouring channels, over `tokens` rows from row `first` of a piece on. x is the
// piece's row 0. The inputs before it are the state's, which `tail` holds once more as rows of n.
template <int KERNEL>
static inline void convolve_rows(const float *x, int64_t width, int64_t first, int tokens, const float *tail,
                                 const float *weight, const float *bias, int kernel, int64_t channels, int n, float *y,
                                 int64_t y_row) {
    const int taps = KERNEL ? KERNEL : kernel, history = taps - 1;
    for (int t = 0; t < tokens; t++, y += y_row) {
        auto row = [&](int j) {
            const int64_t at = first + t + j - history;
            return at < 0 ? tail + (at + history) * n : x + at * width;
        };
        if (KERNEL == 4) {
            const float *x0 = row(0), *x1 = row(1), *x2 = row(2), *x3 = row(3);
            const float *w0 = weight, *w1 = w0 + channels, *w2 = w1 + channels, *w3 = w2 + channels;
#pragma omp simd
            for (int i = 0; i < n; i++)
                y[i] = (bias ? bias[i] : 0.0f) + x0[i] * w0[i] + x1[i] * w1[i] + x2[i] * w2[i] + x3[i] * w3[i];
        } else {
            for (int i = 0; i < n; i++) y[i] = bias ? bias[i] : 0.0f;
            for (int j = 0; j < taps; j++) {
                const float *from = row(j), *w = weight + j * channels;
                for (int i = 0; i < n; i++) y[i] += from[i] * w[i];
            }
        }
        for (int i = 0; i < n; i++) y[i] = silu(y[i]);
    }
}

static inline void normalise_rows(float *x, int64_t row, int tokens, int d_k, float scale) {
    for (int t = 0; t < tokens; t++) {
        const float factor = scale / std::sqrt(sum_of_squares(x + t * row, d_k) + L2_EPS);
        for (int i = 0; i < d_k; i++) x[t * row + i] *= factor;
    }
}

// How many floats `mix` works in: each thread by itself, and all together.
static inline size_t piece_floats(const Delta &l) {
    return Chunk::floats(l.d_k, l.d_v) + l.groups() * Chunk::state_floats(l.d_k, l.d_v) +
           (size_t)l.history() * std::max(l.d_k, l.d_v);
}
static inline size_t shared_piece_floats(const Delta &) { return 0; }

// Runs one key head of a piece with its value heads. `in` is the piece's first row; `state` and `past` are the
// sequence's, and move on.
static void mix_piece(const Delta &l, const float *in, int64_t tokens, float *state, float *past, int head,
                      float *memory, float *out) {
    const int d_k = l.d_k, d_v = l.d_v, history = l.history();
    const int64_t width = l.width(), first_head = (int64_t)head * l.groups();
    Chunk chunk(d_k, d_v, memory);
    float *states = memory + Chunk::floats(d_k, d_v), *tail = states + l.groups() * Chunk::state_floats(d_k, d_v);
    auto padded = [&](int g) { return states + g * Chunk::state_floats(d_k, d_v); };
    for (int g = 0; g < l.groups(); g++) chunk.load_state(state + (first_head + g) * d_k * d_v, padded(g));

    for (int64_t first = 0; first < tokens; first += CHUNK) {
        const int count = std::min<int64_t>(CHUNK, tokens - first);
        auto conv = [&](int64_t from, int n, float *y, int64_t y_row) {
            float *own = past + from * history;
            if (first < history)
                for (int j = 0; j < history; j++)
                    for (int i = 0; i < n; i++) tail[j * n + i] = own[i * history + j];
            auto run = l.conv_kernel == 4 ? convolve_rows<4> : convolve_rows<0>;
            run(in + from, width, first, count, tail, l.conv_weight + from, l.conv_bias ? l.conv_bias + from : nullptr,
                l.conv_kernel, l.channels(), n, y, y_row);
            if (first + count == tokens)
                for (int j = 0; j < history; j++) {
                    const int64_t at = tokens + j - history;
                    const float *row = at < 0 ? tail + (at + history) * n : in + from + at * width;
                    for (int i = 0; i < n; i++) own[i * history + j] = row[i];
                }
        };
        conv((int64_t)head * d_k, d_k, chunk.q, chunk.key_row);
        conv(l.keys() + (int64_t)head * d_k, d_k, chunk.k, chunk.key_row);
        normalise_rows(chunk.q, chunk.key_row, count, d_k, 1.0f / std::sqrt((float)d_k));
        normalise_rows(chunk.k, chunk.key_row, count, d_k, 1.0f);
        chunk.prepare(count);
        for (int g = 0; g < l.groups(); g++) {
            const int64_t h = first_head + g;
            conv(2 * l.keys() + h * d_v, d_v, chunk.v, chunk.value_row);
            for (int t = 0; t < count; t++) {
                chunk.beta[t] = l.beta(in + (first + t) * width, h);
                chunk.log_decay[t] = l.log_decay(in + (first + t) * width, h);
            }
            chunk.advance(count, padded(g));
            for (int t = 0; t < count; t++)
                l.finish(in + (first + t) * width, h, chunk.o + t * chunk.value_row,
                         out + (first + t) * l.values() + h * d_v);
        }
    }
    for (int g = 0; g < l.groups(); g++) chunk.store_state(padded(g), state + (first_head + g) * d_k * d_v);
}

// Runs pieces whose states are float32, a row for each sequence. Every thread of a team calls it.
static void mix(const Delta &l, const float *in, const Block &block, const DeltaState &state, Memory memory,
                float *out) {
    float *const recurrent = (float *)state.recurrent, *const conv = (float *)state.conv;
    const int64_t state_size = l.values() * l.d_k, past_size = l.channels() * l.history();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < block.num_pieces * l.num_k_heads; i++) {
        const Piece &p = block.pieces[i / l.num_k_heads];
        mix_piece(l, in + p.first * l.width(), p.tokens, recurrent + p.sequence * state_size,
                  conv + p.sequence * past_size, i % l.num_k_heads, memory.own, out + p.first * l.values());
    }
}
