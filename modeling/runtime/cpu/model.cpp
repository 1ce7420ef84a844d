// A model on a CPU, whole or layer by layer: one token of each of B requests, states in place on the slot pool
// (decode), or the tokens of packed sequences (prefill).
//
// Compiled for the machine it runs on (build.py) and called through ctypes, so it sees no torch: the structures in
// layer.h, delta.h, mlp.h and delta_rule.h are mirrored in compiled.py and rule.py. Weights are read as they lie in the
// module, row major [out, in], float32 or bfloat16; activations, norms, gates and the recurrence are float32.

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

// x += added (if any), out = rms_norm(x); of one token.
static void norm(float *x, const float *added, const float *weight, float eps, int n, float *out) {
    if (added)
        for (int i = 0; i < n; i++) x[i] += added[i];
    const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / n + eps);
    for (int i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

// `arranged` has room for `batch` rows of depth + LANES.
template <class W>
static void linear(const float *x, int64_t batch, int64_t depth, const void *w, int64_t rows, float *arranged,
                   float *y) {
    arrange<W>(x, batch, depth, arranged);
    product(arranged, batch, depth, (const W *)w, rows, y);
}

// Layers first to last, excluded.
struct Span {
    int first, last;
};

// Activations of n tokens, and `own` floats for each thread's mixer.
struct Buffers {
    float *x, *y, *in, *out, *arranged, *own;
    size_t own_size;

    bool reserve(const Model &model, Span span, int64_t n, int threads, size_t own_floats) {
        const int64_t size = model.hidden;
        int64_t wide = 0, narrow = size;
        for (int i = span.first; i < span.last; i++) {
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

// What goes into the first layer and comes out of the last: token ids and hidden states after the final norm for a
// whole model; for a part of one float32 hidden states [n, hidden], in place.
template <class W> struct Stream {
    const int64_t *ids;
    W *hidden;
    float *between; // null for a whole model

    Stream from(int64_t token, int64_t size) const {
        return between ? Stream{nullptr, nullptr, between + token * size}
                       : Stream{ids + token, hidden + token * size, nullptr};
    }
};

// n tokens through the layers of a span. mix(i, own) turns buffers.in into buffers.out; called by every thread.
template <class W, class Mix>
static void forward(const Model &model, Span span, int64_t n, const Stream<W> &stream, const Buffers &buffers,
                    int threads, Mix mix) {
    const int64_t size = model.hidden;
    const auto [x, y, in, out, arranged, own, own_size] = buffers;
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals flush;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n; b++)
            for (int64_t i = 0; i < size; i++)
                x[b * size + i] = stream.between ? stream.between[b * size + i]
                                                 : read((const W *)model.embeddings + stream.ids[b] * size + i);
        for (int i = span.first; i < span.last; i++) {
            const Layer &l = model.layers[i];
#pragma omp for schedule(static)
            for (int64_t b = 0; b < n; b++)
                norm(x + b * size, i > span.first ? y + b * size : nullptr, l.mixer_norm, l.norm_eps, size,
                     y + b * size);
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
            if (stream.between) {
                for (int64_t i = 0; i < size; i++) stream.between[b * size + i] = x[b * size + i] + y[b * size + i];
                continue;
            }
            norm(x + b * size, y + b * size, model.norm, model.norm_eps, size, y + b * size);
            for (int64_t i = 0; i < size; i++) write(stream.hidden + b * size + i, y[b * size + i]);
        }
    }
}

// states: one for each layer of the span.
template <class W>
static int decode(const Model &model, Span span, const DeltaState *states, int64_t batch, const int64_t *slots,
                  const Stream<W> &stream, int threads) {
    size_t own = 0;
    for (int i = span.first; i < span.last; i++) own = std::max(own, step_floats(model.layers[i].mixer));
    Buffers buffers;
    if (!buffers.reserve(model, span, batch, threads, own)) return 3;
    forward(model, span, batch, stream, buffers, threads, [&](int i, float *memory) {
        mix(model.layers[i].mixer, buffers.in, batch, slots, states[i - span.first], memory, buffers.out);
    });
    return 0;
}

template <class W>
static int prefill(const Model &model, Span span, const DeltaState *states, int64_t sequences,
                   const int64_t *cu_seqlens, const Stream<W> &stream, int threads) {
    size_t own = 0;
    for (int i = span.first; i < span.last; i++) own = std::max(own, piece_floats(model.layers[i].mixer));
    const int64_t tokens = cu_seqlens[sequences];
    Buffers buffers;
    if (!buffers.reserve(model, span, std::min(tokens, PREFILL_BLOCK), threads, own)) return 3;
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
        forward(model, span, end - begin, stream.from(begin, model.hidden), buffers, threads,
                [&](int i, float *memory) {
                    mix_pieces(model.layers[i].mixer, buffers.in, pieces.data(), pieces.size(), states[i - span.first],
                               memory, buffers.out);
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

static bool known(const Model *model, const int64_t *ids, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= model->vocab) return false;
    return true;
}
static bool inside(const int64_t *slots, int64_t n, int64_t rows) {
    for (int64_t b = 0; b < n; b++)
        if (slots[b] < 0 || slots[b] >= rows) return false;
    return true;
}

// hidden [batch, hidden] in the weights' dtype; `rows` that each state has.
extern "C" int lowkey_decode(const Model *model, const DeltaState *states, int64_t rows, int64_t batch,
                             const int64_t *ids, const int64_t *slots, void *hidden, int threads) {
    if (!known(model, ids, batch)) return 1;
    if (!inside(slots, batch, rows)) return 2;
    const Span all = {0, model->num_layers};
    return model->bf16_weights
               ? decode(*model, all, states, batch, slots, Stream<bf16>{ids, (bf16 *)hidden, nullptr}, threads)
               : decode(*model, all, states, batch, slots, Stream<float>{ids, (float *)hidden, nullptr}, threads);
}

// One layer alone; x [batch, hidden] float32, in place.
extern "C" int lowkey_decode_layer(const Model *model, int layer, const DeltaState *state, int64_t rows, int64_t batch,
                                   const int64_t *slots, float *x, int threads) {
    if (!inside(slots, batch, rows)) return 2;
    const Span one = {layer, layer + 1};
    return model->bf16_weights ? decode(*model, one, state, batch, slots, Stream<bf16>{nullptr, nullptr, x}, threads)
                               : decode(*model, one, state, batch, slots, Stream<float>{nullptr, nullptr, x}, threads);
}

// states: float32, a row for each sequence, moved on in place. hidden [tokens, hidden] in the weights' dtype.
extern "C" int lowkey_prefill(const Model *model, const DeltaState *states, int64_t sequences,
                              const int64_t *cu_seqlens, const int64_t *ids, void *hidden, int threads) try {
    if (!known(model, ids, cu_seqlens[sequences])) return 1;
    const Span all = {0, model->num_layers};
    return model->bf16_weights ? prefill(*model, all, states, sequences, cu_seqlens,
                                         Stream<bf16>{ids, (bf16 *)hidden, nullptr}, threads)
                               : prefill(*model, all, states, sequences, cu_seqlens,
                                         Stream<float>{ids, (float *)hidden, nullptr}, threads);
} catch (const std::bad_alloc &) {
    return 3;
}

// One layer alone; x [tokens, hidden] float32, in place.
extern "C" int lowkey_prefill_layer(const Model *model, int layer, const DeltaState *state, int64_t sequences,
                                    const int64_t *cu_seqlens, float *x, int threads) try {
    const Span one = {layer, layer + 1};
    return model->bf16_weights
               ? prefill(*model, one, state, sequences, cu_seqlens, Stream<bf16>{nullptr, nullptr, x}, threads)
               : prefill(*model, one, state, sequences, cu_seqlens, Stream<float>{nullptr, nullptr, x}, threads);
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

// y [batch, rows] float32 = x [batch, depth] w [rows, depth]^T, both float32 or both bfloat16.
extern "C" int lowkey_linear(const void *x, int64_t batch, int64_t depth, const void *w, int64_t rows, float *y,
                             int is_bf16, int threads) {
    return is_bf16 ? linear_rows((const bf16 *)x, batch, depth, (const bf16 *)w, rows, y, threads)
                   : linear_rows((const float *)x, batch, depth, (const float *)w, rows, y, threads);
}

// What compiled.py compares its mirror of the structures with.
extern "C" int64_t lowkey_layout() {
    return (int64_t)sizeof(Layer) << 40 | (int64_t)sizeof(Delta) << 20 | sizeof(Model) << 10 | sizeof(DeltaState);
}
