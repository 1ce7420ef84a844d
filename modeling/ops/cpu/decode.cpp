// One decode step of a whole model on a CPU: one token of each of B requests, states in place on the slot pool.
//
// Compiled for the machine it runs on (build.py) and called through ctypes, so it sees no torch: the structures below
// are mirrored in decoder.py. Weights are read as they lie in the module, row major [out, in]; activations, norms,
// gates and the recurrence are float32; weights and states may be bfloat16. Everything between the input and the
// output projection of a mixer is one pass per (request, key head).

#include "products.h"

#include <algorithm>
#include <cstdlib>
#ifdef _OPENMP
#include <omp.h>
#endif

constexpr float L2_EPS = 1e-6f;

enum Gate : int32_t { NO_GATE, SILU, SIGMOID };

struct Layer {
    const float *mixer_norm, *mlp_norm;                      // [hidden]
    const void *in_proj, *o_proj, *mlp_in, *mlp_out;         // row major, in the weights' dtype
    const float *conv_weight, *conv_bias;                    // [conv_kernel, channels], [channels] or null
    const float *decay_rate, *dt_bias;                       // -exp(A_log) [num_v_heads]; null without decay
    const float *o_norm;                                     // [d_v]
    float norm_eps, o_norm_eps, beta_scale;
    int32_t num_k_heads, num_v_heads, d_k, d_v, conv_kernel, has_beta, gate, intermediate;
};

struct Model {
    const void *embeddings;                                  // [vocab, hidden]
    const float *norm;
    const Layer *layers;
    float norm_eps;
    int32_t num_layers, hidden, vocab, bf16_weights;
};

struct Pool {
    void *const *recurrent, *const *conv;                    // per layer
    int64_t slots;
    int32_t bf16_state, bf16_conv;
};

// ---- the mixer, between its projections

// Convolution over the last inputs and x, SiLU; `past` moves on. All of n neighbouring channels.
template <int KERNEL, class C>
static inline void convolve(const float *x, C *past, const float *weight, const float *bias, int kernel,
                            int64_t channels, int n, float *y) {
    const int history = (KERNEL ? KERNEL : kernel) - 1;
#pragma omp simd
    for (int i = 0; i < n; i++) {
        float sum = x[i] * weight[history * channels + i] + (bias ? bias[i] : 0.0f);
        for (int j = 0; j < history; j++) sum += read(past + i * history + j) * weight[j * channels + i];
        for (int j = 0; j + 1 < history; j++) past[i * history + j] = past[i * history + j + 1];
        if (history) write(past + i * history + history - 1, x[i]);
        y[i] = silu(sum);
    }
}

// COLUMNS vectors of columns of one head's state: S = decay S + k d^T with d = beta (v - decay S^T k), o = S^T q.
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
static void update_head(S *state, int d_k, int d_v, const float *q, const float *k, const float *v, float decay,
                        float beta, float qk, float *o) {
    constexpr int MOST = LANES == 16 ? 8 : 4;  // sums that registers hold
    int j = 0;
    for (; j + MOST * LANES <= d_v; j += MOST * LANES)
        update_columns<MOST>(state + j, d_k, d_v, q, k, v + j, decay, beta, qk, o + j);
    for (; j + LANES <= d_v; j += LANES)
        update_columns<1>(state + j, d_k, d_v, q, k, v + j, decay, beta, qk, o + j);
    for (; j < d_v; j++) {
        float sk = 0, sq = 0;
        for (int64_t i = 0; i < d_k; i++) sk += read(state + i * d_v + j) * k[i], sq += read(state + i * d_v + j) * q[i];
        float delta = (v[j] - sk * decay) * beta;
        o[j] = sq * decay + delta * qk;
        for (int64_t i = 0; i < d_k; i++) write(state + i * d_v + j, read(state + i * d_v + j) * decay + delta * k[i]);
    }
}

// One key head of one request with its value heads. `scratch` has room for 2 * d_k + d_v floats.
template <class S, class C>
static void mix_head(const Layer &l, const float *in, S *state, C *past, int head, float *scratch, float *out) {
    const int d_k = l.d_k, d_v = l.d_v, groups = l.num_v_heads / l.num_k_heads, history = l.conv_kernel - 1;
    const int64_t keys = (int64_t)l.num_k_heads * d_k, values = (int64_t)l.num_v_heads * d_v;
    const int64_t channels = 2 * keys + values;
    const float *gate = in + channels, *beta_in = gate + (l.gate == NO_GATE ? 0 : values);
    const float *decay_in = beta_in + (l.has_beta ? l.num_v_heads : 0);
    float *q = scratch, *k = q + d_k, *v = k + d_k;
    auto conv = [&](int64_t from, int n, float *y) {
        auto run = l.conv_kernel == 4 ? convolve<4, C> : convolve<0, C>;
        run(in + from, past + from * history, l.conv_weight + from, l.conv_bias ? l.conv_bias + from : nullptr,
            l.conv_kernel, channels, n, y);
    };
    conv((int64_t)head * d_k, d_k, q);
    conv(keys + (int64_t)head * d_k, d_k, k);
    float qq = 0, kk = 0, qk = 0;
#pragma omp simd reduction(+ : qq, kk, qk)
    for (int i = 0; i < d_k; i++) qq += q[i] * q[i], kk += k[i] * k[i], qk += q[i] * k[i];
    const float q_scale = 1.0f / std::sqrt((qq + L2_EPS) * d_k), k_scale = 1.0f / std::sqrt(kk + L2_EPS);
    for (int i = 0; i < d_k; i++) q[i] *= q_scale, k[i] *= k_scale;
    qk *= q_scale * k_scale;
    for (int64_t h = (int64_t)head * groups; h < (int64_t)(head + 1) * groups; h++) {
        conv(2 * keys + h * d_v, d_v, v);
        float beta = l.beta_scale * (l.has_beta ? sigmoid(beta_in[h]) : 1.0f), decay = 1.0f;
        if (l.decay_rate) {
            float x = decay_in[h] + l.dt_bias[h];
            decay = std::exp(l.decay_rate[h] * (x > 20.0f ? x : std::log1p(std::exp(x))));
        }
        float *o = out + h * d_v;
        update_head(state + h * d_k * d_v, d_k, d_v, q, k, v, decay, beta, qk, o);
        const float scale = 1.0f / std::sqrt(sum_of_squares(o, d_v) / d_v + l.o_norm_eps), *z = gate + h * d_v;
        for (int i = 0; i < d_v; i++) o[i] *= scale * l.o_norm[i];
        if (l.gate == SILU)
            for (int i = 0; i < d_v; i++) o[i] *= silu(z[i]);
        if (l.gate == SIGMOID)
            for (int i = 0; i < d_v; i++) o[i] *= sigmoid(z[i]);
    }
}

template <class S, class C>
static void mix(const Layer &l, const float *in, int64_t width, int64_t batch, const int64_t *slots, void *recurrent,
                void *conv, float *scratch, float *out) {
    const int64_t state_size = (int64_t)l.num_v_heads * l.d_k * l.d_v, values = (int64_t)l.num_v_heads * l.d_v;
    const int64_t past_size = (2 * (int64_t)l.num_k_heads * l.d_k + values) * (l.conv_kernel - 1);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < batch * l.num_k_heads; i++) {
        int64_t b = i / l.num_k_heads, slot = slots[b];
        mix_head(l, in + b * width, (S *)recurrent + slot * state_size, (C *)conv + slot * past_size,
                 i % l.num_k_heads, scratch, out + b * values);
    }
}

// ---- the step

// Grows, and stays with its thread: fresh memory for every step would be zeroed by the kernel page by page.
struct Scratch {
    float *memory = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(memory); }
    bool reserve(size_t floats) {
        if (floats <= size) return true;
        std::free(memory);
        memory = (float *)std::aligned_alloc(64, (floats * 4 + 63) / 64 * 64);
        size = memory ? floats : 0;
        return memory;
    }
};
static thread_local Scratch scratch;

// Denormals are taken as zero while a step runs: a state that decays towards zero would slow every product down.
struct FlushDenormals {
#ifdef __SSE__
    unsigned before = _mm_getcsr();
    FlushDenormals() { _mm_setcsr(before | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(before); }
#endif
};

// x += added (if any), out = rms_norm(x); of one request.
static void norm(float *x, const float *added, const float *weight, float eps, int n, float *out) {
    if (added)
        for (int i = 0; i < n; i++) x[i] += added[i];
    const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

// `arranged` has room for `batch` rows of depth + 2 * LANES.
template <class W>
static void linear(const float *x, int64_t batch, int64_t depth, const void *w, int64_t rows, float *arranged,
                   float *y) {
#pragma omp single
    arrange<W>(x, batch, depth, arranged);
    product(arranged, batch, depth, (const W *)w, rows, y);
}

static int64_t projected(const Layer &l) {
    const int64_t values = (int64_t)l.num_v_heads * l.d_v;
    return 2 * (int64_t)l.num_k_heads * l.d_k + values + (l.gate == NO_GATE ? 0 : values) +
           (l.has_beta ? l.num_v_heads : 0) + (l.decay_rate ? l.num_v_heads : 0);
}

template <class W>
static int decode(const Model &model, const Pool &pool, int64_t batch, const int64_t *ids, const int64_t *slots,
                  W *hidden, int threads) {
    const int64_t size = model.hidden;
    int64_t wide = 0, narrow = size, heads = 0;
    for (int i = 0; i < model.num_layers; i++) {
        const Layer &l = model.layers[i];
        wide = std::max({wide, projected(l), 2 * (int64_t)l.intermediate});
        narrow = std::max({narrow, (int64_t)l.num_v_heads * l.d_v, (int64_t)l.intermediate});
        heads = std::max(heads, (int64_t)(2 * l.d_k + l.d_v));
    }
    const int64_t rows = 2 * size + wide + narrow + narrow + 2 * LANES;
    if (!scratch.reserve(batch * rows + threads * heads)) return 3;
    float *x = scratch.memory, *y = x + batch * size, *in = y + batch * size, *out = in + batch * wide;
    float *arranged = out + batch * narrow, *head_room = arranged + batch * (narrow + 2 * LANES);

#pragma omp parallel num_threads(threads)
    {
        FlushDenormals flush;
#ifdef _OPENMP
        float *own = head_room + omp_get_thread_num() * heads;
#else
        float *own = head_room;
#endif
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t i = 0; i < size; i++) x[b * size + i] = read((const W *)model.embeddings + ids[b] * size + i);
        for (int i = 0; i < model.num_layers; i++) {
            const Layer &l = model.layers[i];
            const int64_t width = projected(l), values = (int64_t)l.num_v_heads * l.d_v, inner = l.intermediate;
#pragma omp for schedule(static)
            for (int64_t b = 0; b < batch; b++)
                norm(x + b * size, i ? y + b * size : nullptr, l.mixer_norm, l.norm_eps, size, y + b * size);
            linear<W>(y, batch, size, l.in_proj, width, arranged, in);
            auto mixer = pool.bf16_state ? (pool.bf16_conv ? mix<bf16, bf16> : mix<bf16, float>)
                                         : (pool.bf16_conv ? mix<float, bf16> : mix<float, float>);
            mixer(l, in, width, batch, slots, pool.recurrent[i], pool.conv[i], own, out);
            linear<W>(out, batch, values, l.o_proj, size, arranged, y);
#pragma omp for schedule(static)
            for (int64_t b = 0; b < batch; b++)
                norm(x + b * size, y + b * size, l.mlp_norm, l.norm_eps, size, y + b * size);
            linear<W>(y, batch, size, l.mlp_in, 2 * inner, arranged, in);
#pragma omp for schedule(static)
            for (int64_t b = 0; b < batch; b++) {
                const float *gate = in + b * 2 * inner, *up = gate + inner;
                for (int64_t j = 0; j < inner; j++) out[b * inner + j] = silu(gate[j]) * up[j];
            }
            linear<W>(out, batch, inner, l.mlp_out, size, arranged, y);
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < batch; b++) {
            norm(x + b * size, y + b * size, model.norm, model.norm_eps, size, y + b * size);
            for (int64_t i = 0; i < size; i++) write(hidden + b * size + i, y[b * size + i]);
        }
    }
    return 0;
}

template <class W>
static int linear_rows(const W *x, int64_t batch, int64_t depth, const W *w, int64_t rows, float *y, int threads) {
    if (!scratch.reserve(batch * (2 * depth + 2 * LANES))) return 3;
    float *wide = scratch.memory, *arranged = wide + batch * depth;
    for (int64_t i = 0; i < batch * depth; i++) wide[i] = read(x + i);
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals flush;
        linear<W>(wide, batch, depth, w, rows, arranged, y);
    }
    return 0;
}

// 0, or 1: a token id is out of range, 2: a slot is, 3: out of memory. `hidden` [batch, hidden] in the weights' dtype.
extern "C" int lowkey_decode(const Model *model, const Pool *pool, int64_t batch, const int64_t *ids,
                             const int64_t *slots, void *hidden, int threads) {
    for (int64_t b = 0; b < batch; b++) {
        if (ids[b] < 0 || ids[b] >= model->vocab) return 1;
        if (slots[b] < 0 || slots[b] >= pool->slots) return 2;
    }
    return model->bf16_weights ? decode(*model, *pool, batch, ids, slots, (bf16 *)hidden, threads)
                               : decode(*model, *pool, batch, ids, slots, (float *)hidden, threads);
}

// y [batch, rows] float32 = x [batch, depth] w [rows, depth]^T, both float32 or both bfloat16.
extern "C" int lowkey_linear(const void *x, int64_t batch, int64_t depth, const void *w, int64_t rows, float *y,
                             int is_bf16, int threads) {
    return is_bf16 ? linear_rows((const bf16 *)x, batch, depth, (const bf16 *)w, rows, y, threads)
                   : linear_rows((const float *)x, batch, depth, (const float *)w, rows, y, threads);
}

// What decoder.py compares its mirror of the structures with.
extern "C" int64_t lowkey_layout() { return sizeof(Layer) << 32 | sizeof(Model) << 16 | sizeof(Pool); }
