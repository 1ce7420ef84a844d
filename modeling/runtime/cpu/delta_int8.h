// The update of one head's state in 8 bits (modeling/state/rounding.py says how it is kept): S = decay S + k d^T with
// d = beta (v - decay S^T k), and o = S^T q.
//
// The state before is code * scale. What a column gets depends on its largest new entry, so that the codes are read
// three times: for S^T k and S^T q, for the largest entry, and to be written. From the second time on they come out of
// the nearest cache.
#pragma once

#include "vectors.h"

constexpr float LEVELS = 127.0f, SMALLEST = 0x1p-100f;
// Added to a number of at most 2^22 in size it leaves no bits for fractions: the sum's last bits are the nearest whole
// number, ties to even.
constexpr float ROUNDING = 0x1.8p23f;

// A column's new scale, and the inverse to multiply its entries by, given its largest entry. `delta` is NaN or Inf
// where the column is, which a maximum does not see.
static inline float scale_of(float largest, float delta, float *inverse) {
    const bool none = largest < SMALLEST;
    *inverse = none ? 0.0f : LEVELS / largest;
    return (none ? 0.0f : largest * (1 / LEVELS)) + 0.0f * delta;
}
static inline int8_t code_of(float x, float inverse) {
    const float sum = x * inverse + ROUNDING;
    return (int8_t)peek<uint32_t>(&sum);
}
static inline bvec codes_of(vec x, vec inverse) { return narrow_to_8((uvec)(x * inverse + ROUNDING)); }

template <int COLUMNS>
static inline void update_columns(int8_t *state, float *scales, int d_k, int d_v, const float *q, const float *k,
                                  const float *v, float decay, float beta, float qk, float *o) {
    vec sk[COLUMNS] = {}, sq[COLUMNS] = {};
    for (int i = 0; i < d_k; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
            vec s = load(state + (int64_t)i * d_v + j * LANES);
            sk[j] += s * k[i];
            sq[j] += s * q[i];
        }
    vec before[COLUMNS], delta[COLUMNS], largest[COLUMNS] = {}, inverse[COLUMNS];
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) {
        before[j] = load(scales + j * LANES) * decay;
        delta[j] = (load(v + j * LANES) - sk[j] * before[j]) * beta;
        store(o + j * LANES, sq[j] * before[j] + delta[j] * qk);
    }
    auto updated = [&](int i, int j) {
        return load(state + (int64_t)i * d_v + j * LANES) * before[j] + delta[j] * k[i];
    };
    for (int i = 0; i < d_k; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
            vec s = updated(i, j);
            s = (vec)((uvec)s & 0x7fffffff);
            largest[j] = s > largest[j] ? s : largest[j];
        }
#pragma GCC unroll 8
    for (int j = 0; j < COLUMNS; j++) {
        const vec zero = {}, most = largest[j];
        inverse[j] = most < SMALLEST ? zero : LEVELS / most;
        store(scales + j * LANES, (most < SMALLEST ? zero : most * (1 / LEVELS)) + 0.0f * delta[j]);
    }
    for (int i = 0; i < d_k; i++)
#pragma GCC unroll 8
        for (int j = 0; j < COLUMNS; j++) {
            bvec codes = codes_of(updated(i, j), inverse[j]);
            std::memcpy(state + (int64_t)i * d_v + j * LANES, &codes, sizeof codes);
        }
}

static void update_head(int8_t *state, float *scales, int d_k, int d_v, const float *q, const float *k, const float *v,
                        float decay, float beta, float qk, float *o) {
    constexpr int MOST = LANES == 16 ? 8 : 4;
    int j = 0;
    for (; j + MOST * LANES <= d_v; j += MOST * LANES)
        update_columns<MOST>(state + j, scales + j, d_k, d_v, q, k, v + j, decay, beta, qk, o + j);
    for (; j + LANES <= d_v; j += LANES)
        update_columns<1>(state + j, scales + j, d_k, d_v, q, k, v + j, decay, beta, qk, o + j);
    for (; j < d_v; j++) {
        float sk = 0, sq = 0, largest = 0, inverse;
        for (int64_t i = 0; i < d_k; i++) sk += state[i * d_v + j] * k[i], sq += state[i * d_v + j] * q[i];
        const float before = scales[j] * decay, delta = (v[j] - sk * before) * beta;
        o[j] = sq * before + delta * qk;
        auto updated = [&](int64_t i) { return state[i * d_v + j] * before + delta * k[i]; };
        for (int64_t i = 0; i < d_k; i++) largest = std::fmax(largest, std::fabs(updated(i)));
        scales[j] = scale_of(largest, delta, &inverse);
        for (int64_t i = 0; i < d_k; i++) state[i * d_v + j] = code_of(updated(i), inverse);
    }
}
