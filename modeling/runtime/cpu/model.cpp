// A model on a CPU, whole or layer by layer: one token of each of B requests, states in place on the slot pool
// (decode), or the tokens of packed sequences (prefill).
//
// Compiled for the machine it runs on (build.py) and called through ctypes, so it sees no torch: the structures in
// layer.h, delta.h, mlp.h and delta_rule.h are mirrored in compiled.py, delta.py, mlp.py and rule.py. Weights are read
// as they lie in the module, row major [out, in], float32 or bfloat16; activations, norms, gates and the recurrence are
// float32.

#include "delta_prefill.h"
#include "delta_rule.h"
#include "delta_step.h"
#include "layer.h"
#include "products.h"

#include <cstdlib>
#include <new>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

// Tokens of a prefill that go through the model at a time: few, so that their activations stay in the second-level
// cache.
constexpr int64_t PREFILL_BLOCK = 128;

static int thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Memory that grows, and stays with its thread: fresh memory for every step would be zeroed by the kernel page by page.
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

// Adds `added`, if any, to one token's x, and writes the RMSNorm of that to `out`.
static void norm(float *x, const float *added, const float *weight, float eps, int n, float *out) {
    if (added)
        for (int i = 0; i < n; i++) x[i] += added[i];
    const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

// Multiplies x by w; `arranged` has room for `batch` rows of depth + LANES.
template <class W>
static void linear(const float *x, int64_t batch, int64_t depth, const void *w, int64_t rows, float *arranged,
                   float *y) {
    arrange<W>(x, batch, depth, arranged);
    product(arranged, batch, depth, (const W *)w, rows, y);
}

// The activations of n tokens, and `own` floats for each thread's mixer.
struct Buffers {
    float *x, *y, *in, *out, *arranged, *own;
    size_t own_size;

    bool reserve(const Model &model, int64_t n, int threads, size_t own_floats) {
        const int64_t size = model.hidden;
        int64_t wide = 0, narrow = size;
        for (int i = 0; i < model.num_layers; i++) {
            const Layer &l = model.layers[i];
            wide = std::max({wide, l.mixer.width(), l.ffn.width()});
            narrow = std::max({narrow, l.mixer.values(), (int64_t)l.ffn.intermediate});
        }
        own_size = own_floats;
        if (!scratch.reserve(n * (2 * size + wide + narrow + narrow + LANES) + threads * own_size)) return false;
        x = scratch.memory, y = x + n * size, in = y + n * size, out = in + n * wide, arranged = out + n * narrow;
        own = arranged + n * (narrow + LANES);
        return true;
    }
};

// Runs n tokens through all layers. mix(layer, own) turns buffers.in into buffers.out; every thread calls it.
template <class W, class Mix>
static void forward(const Model &model, int64_t n, const int64_t *ids, void *hidden, const Buffers &buffers,
                    int threads, Mix mix) {
    const int64_t size = model.hidden;
    const auto [x, y, in, out, arranged, own, own_size] = buffers;
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals flush;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n; b++)
            for (int64_t i = 0; i < size; i++)
                x[b * size + i] = model.is_part() ? ((const float *)hidden)[b * size + i]
                                                  : read((const W *)model.embeddings + ids[b] * size + i);
        for (int i = 0; i < model.num_layers; i++) {
            const Layer &l = model.layers[i];
#pragma omp for schedule(static)
            for (int64_t b = 0; b < n; b++)
                norm(x + b * size, i ? y + b * size : nullptr, l.mixer_norm, l.norm_eps, size, y + b * size);
            linear<W>(y, n, size, l.mixer.in_proj, l.mixer.width(), arranged, in);
            mix(i, own + thread_number() * own_size);
            linear<W>(out, n, l.mixer.values(), l.mixer.o_proj, size, arranged, y);
#pragma omp for schedule(static)
            for (int64_t b = 0; b < n; b++)
                norm(x + b * size, y + b * size, l.ffn_norm, l.norm_eps, size, y + b * size);
            linear<W>(y, n, size, l.ffn.in_proj, l.ffn.width(), arranged, in);
            swiglu(l.ffn, in, n, out);
            linear<W>(out, n, l.ffn.intermediate, l.ffn.out_proj, size, arranged, y);
        }
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n; b++) {
            float *const last = y + b * size;
            if (model.is_part()) {
                for (int64_t i = 0; i < size; i++) ((float *)hidden)[b * size + i] = x[b * size + i] + last[i];
                continue;
            }
            norm(x + b * size, last, model.norm, model.norm_eps, size, last);
            for (int64_t i = 0; i < size; i++) write((W *)hidden + b * size + i, last[i]);
        }
    }
}

template <class W>
static int decode(const Model &model, const DeltaState *states, int64_t batch, const int64_t *ids, const int64_t *slots,
                  void *hidden, int threads) {
    size_t own = 0;
    for (int i = 0; i < model.num_layers; i++) own = std::max(own, step_floats(model.layers[i].mixer));
    Buffers buffers;
    if (!buffers.reserve(model, batch, threads, own)) return 3;
    forward<W>(model, batch, ids, hidden, buffers, threads, [&](int i, float *memory) {
        mix(model.layers[i].mixer, buffers.in, batch, slots, states[i], memory, buffers.out);
    });
    return 0;
}

template <class W>
static int prefill(const Model &model, const DeltaState *states, int64_t sequences, const int64_t *cu_seqlens,
                   const int64_t *ids, void *hidden, int threads) {
    size_t own = 0;
    for (int i = 0; i < model.num_layers; i++) own = std::max(own, piece_floats(model.layers[i].mixer));
    const int64_t tokens = cu_seqlens[sequences];
    const size_t row = model.hidden * (model.is_part() ? sizeof(float) : sizeof(W));
    Buffers buffers;
    if (!buffers.reserve(model, std::min(tokens, PREFILL_BLOCK), threads, own)) return 3;
    std::vector<Piece> pieces;
    for (int64_t begin = 0, sequence = 0; begin < tokens; begin += PREFILL_BLOCK) {
        const int64_t end = std::min(begin + PREFILL_BLOCK, tokens);
        pieces.clear();
        for (int64_t first = begin; first < end;) {
            const int64_t last = std::min(end, cu_seqlens[sequence + 1]);
            pieces.push_back({sequence, first - begin, last - first});
            if (last == cu_seqlens[sequence + 1]) sequence++;
            first = last;
        }
        forward<W>(model, end - begin, ids + begin, (char *)hidden + begin * row, buffers, threads,
                   [&](int i, float *memory) {
                       mix_pieces(model.layers[i].mixer, buffers.in, pieces.data(), pieces.size(), states[i], memory,
                                  buffers.out);
                   });
    }
    return 0;
}

template <class W>
static int linear_rows(const W *x, int64_t batch, int64_t depth, const W *w, int64_t rows, float *y, int threads) {
    if (!scratch.reserve(batch * (2 * depth + LANES))) return 3;
    float *wide = scratch.memory, *arranged = wide + batch * depth;
    for (int64_t i = 0; i < batch * depth; i++) wide[i] = read(x + i);
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals flush;
        linear<W>(wide, batch, depth, w, rows, arranged, y);
    }
    return 0;
}

// ---- what Python calls: 0, or 1: a token id is out of range, 2: a slot is, 3: out of memory

static bool within(const int64_t *values, int64_t n, int64_t end) {
    return std::all_of(values, values + n, [=](int64_t x) { return x >= 0 && x < end; });
}

// One token of each of `batch` requests. There is a state for each layer, each of `rows` rows, which moves on in place.
// `hidden` is [batch, hidden] in the weights' dtype; for a part of a model it is float32 and goes in as well as out,
// and there are no ids.
extern "C" int lowkey_decode(const Model *model, const DeltaState *states, int64_t rows, int64_t batch,
                             const int64_t *ids, const int64_t *slots, void *hidden, int threads) {
    if (!model->is_part() && !within(ids, batch, model->vocab)) return 1;
    if (!within(slots, batch, rows)) return 2;
    return (model->bf16_weights ? decode<bf16> : decode<float>)(*model, states, batch, ids, slots, hidden, threads);
}

// Packed sequences. The states are float32, a row for each sequence; `hidden` is as above, [tokens, hidden].
extern "C" int lowkey_prefill(const Model *model, const DeltaState *states, int64_t sequences,
                              const int64_t *cu_seqlens, const int64_t *ids, void *hidden, int threads) try {
    if (!model->is_part() && !within(ids, cu_seqlens[sequences], model->vocab)) return 1;
    return (model->bf16_weights ? prefill<bf16> : prefill<float>)(*model, states, sequences, cu_seqlens, ids, hidden,
                                                                  threads);
} catch (const std::bad_alloc &) {
    return 3;
}

extern "C" int lowkey_rule(const Rule *rule, int threads) {
    const size_t own = Chunk::floats(rule->d_k, rule->d_v) + Chunk::state_floats(rule->d_k, rule->d_v);
    if (!scratch.reserve(threads * own)) return 3;
    float *memory = scratch.memory;
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals flush;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rule->sequences * rule->num_k_heads; i++)
            run_rule(*rule, i / rule->num_k_heads, i % rule->num_k_heads, memory + thread_number() * own);
    }
    return 0;
}

// Computes y [batch, rows] float32 = x [batch, depth] w [rows, depth]^T, both float32 or both bfloat16.
extern "C" int lowkey_linear(const void *x, int64_t batch, int64_t depth, const void *w, int64_t rows, float *y,
                             int is_bf16, int threads) {
    return is_bf16 ? linear_rows((const bf16 *)x, batch, depth, (const bf16 *)w, rows, y, threads)
                   : linear_rows((const float *)x, batch, depth, (const float *)w, rows, y, threads);
}

// The sizes of the structures, with which compiled.py compares those of its mirror.
extern "C" int64_t lowkey_layout() {
    return (int64_t)sizeof(Layer) << 40 | (int64_t)sizeof(Delta) << 20 | sizeof(Model) << 10 | sizeof(DeltaState);
}
