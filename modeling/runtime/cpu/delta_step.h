// A mixer between its projections, one token of each of B requests, states in place on the slot pool: everything in one
// pass per (request, key head).
#pragma once

#include "delta.h"
#include "delta_int8.h"

// The convolution over the last inputs and x, and SiLU, of n neighbouring channels; `past` moves on.
template <class C>
static inline void convolve(const float *x, C *past, const float *weight, const float *bias, int kernel,
                            int64_t channels, int n, float *y) {
    const int history = kernel - 1;
    if (kernel == 4) {
        const float *w0 = weight, *w1 = w0 + channels, *w2 = w1 + channels, *w3 = w2 + channels;
#pragma omp simd
        for (int i = 0; i < n; i++) {
            // All three read, then all three written: this is what the compiler makes whole vectors of.
            const float p0 = read(past + 3 * i), p1 = read(past + 3 * i + 1), p2 = read(past + 3 * i + 2), p3 = x[i];
            write(past + 3 * i, p1), write(past + 3 * i + 1, p2), write(past + 3 * i + 2, p3);
            y[i] = (bias ? bias[i] : 0.0f) + p0 * w0[i] + p1 * w1[i] + p2 * w2[i] + p3 * w3[i];
        }
    } else
        for (int i = 0; i < n; i++) {
            float sum = (bias ? bias[i] : 0.0f) + x[i] * weight[history * channels + i];
            for (int j = 0; j < history; j++) sum += read(past + i * history + j) * weight[j * channels + i];
            for (int j = 0; j + 1 < history; j++) past[i * history + j] = past[i * history + j + 1];
            if (history) write(past + i * history + history - 1, x[i]);
            y[i] = sum;
        }
    for (int i = 0; i < n; i++) y[i] = silu(y[i]);
}

// Updates COLUMNS vectors of columns of one head's state: S = decay S + k d^T with d = beta (v - decay S^T k), o = S^T
// q.
template <int COLUMNS, class S>
static inline void update_columns(S *state, int d_k, int d_v, const float *q, const float *k, const float *v,
                                  float decay, float beta, float qk, float *o) {
    vec sk[COLUMNS] = {}, sq[COLUMNS] = {}, delta[COLUMNS];
    for (int i = 0; i < d_k; i++) {
        const S *row = state + (int64_t)i * d_v;
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
            vec s = load(row + j * LANES);
            sk[j] += s * k[i];
            sq[j] += s * q[i];
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) {
        delta[j] = (load(v + j * LANES) - sk[j] * decay) * beta;
        store(o + j * LANES, sq[j] * decay + delta[j] * qk);
    }
    for (int i = 0; i < d_k; i++) {
        S *row = state + (int64_t)i * d_v;
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) store(row + j * LANES, load(row + j * LANES) * decay + delta[j] * k[i]);
    }
}
template <class S>
static void update_head(S *state, float *, int d_k, int d_v, const float *q, const float *k, const float *v,
                        float decay, float beta, float qk, float *o) {
    constexpr int MOST = LANES == 16 ? 8 : 4; // sums that registers hold
    int j = 0;
    for (; j + MOST * LANES <= d_v; j += MOST * LANES)
        update_columns<MOST>(state + j, d_k, d_v, q, k, v + j, decay, beta, qk, o + j);
    for (; j + LANES <= d_v; j += LANES) update_columns<1>(state + j, d_k, d_v, q, k, v + j, decay, beta, qk, o + j);
    for (; j < d_v; j++) {
        float sk = 0, sq = 0;
        for (int64_t i = 0; i < d_k; i++)
            sk += read(state + i * d_v + j) * k[i], sq += read(state + i * d_v + j) * q[i];
        float delta = (v[j] - sk * decay) * beta;
        o[j] = sq * decay + delta * qk;
        for (int64_t i = 0; i < d_k; i++) write(state + i * d_v + j, read(state + i * d_v + j) * decay + delta * k[i]);
    }
}

// Runs one key head of one request with its value heads. `scratch` has room for 2 * d_k + d_v floats.
template <class S, class C>
static void mix_head(const Delta &l, const float *in, S *state, float *scales, C *past, int head, float *scratch,
                     float *out) {
    const int d_k = l.d_k, d_v = l.d_v;
    float *q = scratch, *k = q + d_k, *v = k + d_k;
    auto conv = [&](int64_t from, int n, float *y) {
        convolve(in + from, past + from * l.history(), l.conv_weight + from, l.conv_bias ? l.conv_bias + from : nullptr,
                 l.conv_kernel, l.channels(), n, y);
    };
    conv((int64_t)head * d_k, d_k, q);
    conv(l.keys() + (int64_t)head * d_k, d_k, k);
    float qq = 0, kk = 0, qk = 0;
#pragma omp simd reduction(+ : qq, kk, qk)
    for (int i = 0; i < d_k; i++) qq += q[i] * q[i], kk += k[i] * k[i], qk += q[i] * k[i];
    const float q_scale = 1.0f / std::sqrt((qq + L2_EPS) * d_k), k_scale = 1.0f / std::sqrt(kk + L2_EPS);
    for (int i = 0; i < d_k; i++) q[i] *= q_scale, k[i] *= k_scale;
    qk *= q_scale * k_scale;
    for (int64_t h = (int64_t)head * l.groups(); h < (int64_t)(head + 1) * l.groups(); h++) {
        conv(2 * l.keys() + h * d_v, d_v, v);
        float *o = out + h * d_v;
        update_head(state + h * d_k * d_v, scales ? scales + h * d_v : nullptr, d_k, d_v, q, k, v,
                    std::exp(l.log_decay(in, h)), l.beta(in, h), qk, o);
        l.finish(in, h, o, o);
    }
}

// Runs all heads of a batch. Every thread of a team calls it with `scratch` of its own.
template <class S, class C>
static void mix_rows(const Delta &l, const float *in, const Place *places, int64_t batch, const DeltaState &state,
                     float *scratch, float *out) {
    const int64_t state_size = l.values() * l.d_k, past_size = l.channels() * l.history();
#pragma omp for schedule(static)
    for (int64_t i = 0; i < batch * l.num_k_heads; i++) {
        int64_t b = i / l.num_k_heads, slot = places[b].slot;
        float *scales = state.scales ? state.scales + slot * l.values() : nullptr;
        mix_head(l, in + b * l.width(), (S *)state.recurrent + slot * state_size, scales,
                 (C *)state.conv + slot * past_size, i % l.num_k_heads, scratch, out + b * l.values());
    }
}

static void mix(const Delta &l, const float *in, const Place *places, int64_t batch, const DeltaState &state,
                Memory memory, float *out) {
    const bool narrow = state.conv_type == BFLOAT16;
    auto rows = narrow ? mix_rows<float, bf16> : mix_rows<float, float>;
    if (state.recurrent_type == BFLOAT16) rows = narrow ? mix_rows<bf16, bf16> : mix_rows<bf16, float>;
    if (state.recurrent_type == INT8) rows = narrow ? mix_rows<int8_t, bf16> : mix_rows<int8_t, float>;
    rows(l, in, places, batch, state, memory.own, out);
}

// How many floats `mix` works in: each thread by itself, and all together.
static inline size_t step_floats(const Delta &l) { return 2 * l.d_k + l.d_v; }
static inline size_t shared_step_floats(const Delta &, int64_t) { return 0; }
