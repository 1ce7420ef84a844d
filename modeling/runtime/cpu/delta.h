// The (gated) delta rule mixer: its parameters and its state as delta.py hands them over, and what both of its forms
// share.
#pragma once

#include "batch.h"
#include "vectors.h"

constexpr float L2_EPS = 1e-6f;

enum Gate : int32_t { NO_GATE, SILU, SIGMOID };

struct Delta {
    const void *in_proj, *o_proj;         // row major, in the weights' dtype
    const float *conv_weight, *conv_bias; // [conv_kernel, channels], [channels] or null
    const float *decay_rate, *dt_bias;    // -exp(A_log) [num_v_heads]; null without decay
    const float *o_norm;                  // [d_v]
    float o_norm_eps, beta_scale;
    int32_t num_k_heads, num_v_heads, d_k, d_v, conv_kernel, has_beta, gate;

    int groups() const { return num_v_heads / num_k_heads; }
    int history() const { return conv_kernel - 1; }
    int64_t keys() const { return (int64_t)num_k_heads * d_k; }
    int64_t values() const { return (int64_t)num_v_heads * d_v; }
    int64_t outputs() const { return values(); }
    int64_t channels() const { return 2 * keys() + values(); }
    // Columns of the input projection: q | k | v | gate | beta | decay.
    int64_t beta_at() const { return channels() + (gate == NO_GATE ? 0 : values()); }
    int64_t decay_at() const { return beta_at() + (has_beta ? num_v_heads : 0); }
    int64_t width() const { return decay_at() + (decay_rate ? num_v_heads : 0); }

    // The step size of one token, given its row of the input projection, and one value head.
    float beta(const float *in, int64_t head) const {
        return beta_scale * (has_beta ? sigmoid(in[beta_at() + head]) : 1.0f);
    }
    float log_decay(const float *in, int64_t head) const {
        if (!decay_rate) return 0.0f;
        const float x = in[decay_at() + head] + dt_bias[head];
        return decay_rate[head] * (x > 20.0f ? x : std::log1p(std::exp(x)));
    }
    // Writes o [d_v] to `out` after its RMSNorm and its output gate.
    void finish(const float *in, int64_t head, const float *o, float *out) const {
        const float scale = 1.0f / std::sqrt(sum_of_squares(o, d_v) / d_v + o_norm_eps);
        const float *z = in + channels() + head * d_v;
        for (int i = 0; i < d_v; i++) out[i] = o[i] * scale * o_norm[i];
        if (gate == SILU)
            for (int i = 0; i < d_v; i++) out[i] *= silu(z[i]);
        if (gate == SIGMOID)
            for (int i = 0; i < d_v; i++) out[i] *= sigmoid(z[i]);
    }
};

enum StateType : int32_t { FLOAT32, BFLOAT16, INT8 };

// The state of one layer; it has a row for each slot of a pool, or for each packed sequence.
struct DeltaState {
    void *recurrent; // [rows, num_v_heads, d_k, d_v]
    float *scales;   // [rows, num_v_heads, d_v] beside an int8 recurrent state, else null
    void *conv;      // [rows, channels, conv_kernel - 1], float32 or bfloat16
    int32_t recurrent_type, conv_type;
};
