// A model on a CPU, whole or layer by layer: one token of each of B requests, states in place on the slot pool
// (decode), or the tokens of packed sequences (prefill).
//
// Compiled for the machine it runs on (build.py) and called through ctypes, so it sees no torch: the structures in
// layer.h and in the headers of each kind of layer are mirrored in Python, file by file. Weights are read as they lie
// in the module, row major [out, in], float32 or bfloat16; activations, norms, gates, the recurrence and attention are
// float32.

#include "layer.h"

#include <cstdlib>
#include <new>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

// Tokens of a prefill that go through the model at a time: few, so that their activations stay in the second-level
// cache. With experts more: each block reads all experts that one of its tokens takes, which is nearly all of them.
constexpr int64_t PREFILL_BLOCK = 128, PREFILL_BLOCK_OF_EXPERTS = 512;

static int64_t prefill_block(const Model &model) {
    for (int i = 0; i < model.num_layers; i++)
        if (model.layers[i].ffn_kind == MOE) return PREFILL_BLOCK_OF_EXPERTS;
    return PREFILL_BLOCK;
}

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

// ---- the way through the layers

struct Norm {
    const float *weight = nullptr; // [hidden]; null for no norm
    float eps = 0;

    // Writes that of x to y, which may be x.
    void operator()(const float *x, int n, float *y) const {
        const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / n + eps);
        for (int i = 0; i < n; i++) y[i] = x[i] * scale * weight[i];
    }
};

// Goes from one mixer or feed-forward to the next, for one token: adds what the last one gave, y, to x, and makes y
// what the next one gets.
static void pass(Norm last, Norm next, int n, float *x, float *y) {
    if (last.weight) last(y, n, y);
    for (int i = 0; i < n; i++) x[i] += y[i];
    if (next.weight)
        next(x, n, y);
    else
        std::copy_n(x, n, y);
}

// What a mixer works in between its projections.
struct MixerMemory {
    Carver memory;
    float *in, *out, *arranged, *shared;

    MixerMemory(int64_t width, int64_t outputs, int64_t hidden, int64_t n, int64_t shared_floats, float *base)
        : memory{base}, in(memory.take(n * width)), out(memory.take(n * outputs)),
          arranged(memory.take(n * arranged_size(std::max(hidden, outputs)))), shared(memory.take(shared_floats)) {}
};

// The memory of a call: the activations of n tokens, `work` that mixers and feed-forwards use in turn, and `own_size`
// floats for each thread's mixer.
struct Buffers {
    int64_t n, own_size = 0;
    float *x, *y, *work, *own;

    // own_floats(mixer) and shared_floats(mixer) say what a mixer works in.
    template <class Own, class Shared>
    bool reserve(const Model &model, int64_t tokens, int threads, Own own_floats, Shared shared_floats) {
        int64_t most = 0;
        n = tokens;
        for (int i = 0; i < model.num_layers; i++) {
            const Layer &l = model.layers[i];
            with_mixer(l, [&](const auto &mixer) {
                own_size = std::max<int64_t>(own_size, round_up(own_floats(mixer), 16));
                most = std::max(most, mixer_memory(mixer, model.hidden, shared_floats(mixer), nullptr).memory.used);
            });
            most = std::max(most, with_ffn(l, [&](const auto &ffn) { return ffn_floats(ffn, n, model.hidden); }));
        }
        auto carve = [&](Carver memory) {
            x = memory.take(n * model.hidden), y = memory.take(n * model.hidden), work = memory.take(most);
            own = memory.take(threads * own_size);
            return memory.used;
        };
        if (!scratch.reserve(carve({nullptr}))) return false;
        carve({scratch.memory});
        return true;
    }
    template <class Mixer>
    MixerMemory mixer_memory(const Mixer &mixer, int64_t hidden, int64_t shared_floats, float *base) const {
        return MixerMemory(mixer.width(), mixer.outputs(), hidden, n, shared_floats, base);
    }
};

// Runs n tokens, at most as many as the buffers are for, through all layers. mix(layer, in, memory, out) turns what a
// mixer's first projection gave into what its last one gets; every thread calls it.
template <class W, class Mix>
static void forward(const Model &model, int64_t n, const int64_t *ids, void *hidden, const Buffers &buffers,
                    int threads, Mix mix) {
    const int64_t size = model.hidden;
    float *const x = buffers.x, *const y = buffers.y;
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals flush;
        float *const own = buffers.own + thread_number() * buffers.own_size;
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n; b++)
            for (int64_t i = 0; i < size; i++) {
                x[b * size + i] = 0;
                y[b * size + i] = model.is_part() ? ((const float *)hidden)[b * size + i]
                                                  : read((const W *)model.embeddings + ids[b] * size + i);
            }
        Norm last;
        auto pass_to = [&](Norm norm, bool after) {
#pragma omp for schedule(static)
            for (int64_t b = 0; b < n; b++) pass(last, after ? Norm() : norm, size, x + b * size, y + b * size);
            last = after ? norm : Norm();
        };
        for (int i = 0; i < model.num_layers; i++) {
            const Layer &l = model.layers[i];
            pass_to({l.mixer_norm, l.norm_eps}, l.norm_after);
            with_mixer(l, [&](const auto &mixer) {
                const MixerMemory m = buffers.mixer_memory(mixer, size, 0, buffers.work);
                linear<W>(y, n, size, mixer.in_proj, mixer.width(), m.arranged, m.in);
                mix(i, m.in, Memory{own, m.shared}, m.out);
                linear<W>(m.out, n, mixer.outputs(), mixer.o_proj, size, m.arranged, y);
            });
            pass_to({l.ffn_norm, l.norm_eps}, l.norm_after);
            with_ffn(l, [&](const auto &ffn) { feed_forward<W>(ffn, y, n, size, buffers.work, y); });
        }
        pass_to({model.norm, model.norm_eps}, false);
#pragma omp for schedule(static)
        for (int64_t b = 0; b < n * size; b++)
            if (model.is_part())
                ((float *)hidden)[b] = y[b];
            else
                write((W *)hidden + b, y[b]);
    }
}

template <class W>
static int decode(const Model &model, const LayerState *states, int64_t batch, const Place *places, const int64_t *ids,
                  void *hidden, int threads) {
    Buffers buffers;
    if (!buffers.reserve(
            model, batch, threads, [](const auto &mixer) { return step_floats(mixer); },
            [&](const auto &mixer) { return shared_step_floats(mixer, places[batch].parts_before); }))
        return 3;
    forward<W>(model, batch, ids, hidden, buffers, threads, [&](int i, float *in, Memory memory, float *out) {
        with_mixer(model.layers[i], states[i],
                   [&](const auto &mixer, const auto &state) { mix(mixer, in, places, batch, state, memory, out); });
    });
    return 0;
}

template <class W>
static int prefill(const Model &model, const LayerState *states, int64_t sequences, const int64_t *cu_seqlens,
                   const int64_t *ids, const int64_t *slots, const int32_t *lengths, void *hidden, int threads) {
    const int64_t tokens = cu_seqlens[sequences];
    const size_t row = model.hidden * (model.is_part() ? sizeof(float) : sizeof(W));
    const int64_t block = prefill_block(model);
    Buffers buffers;
    if (!buffers.reserve(
            model, std::min(tokens, block), threads, [](const auto &mixer) { return piece_floats(mixer); },
            [](const auto &mixer) { return shared_piece_floats(mixer); }))
        return 3;
    std::vector<Piece> pieces;
    std::vector<Place> places;
    for (int64_t begin = 0, sequence = 0; begin < tokens; begin += block) {
        const int64_t end = std::min(begin + block, tokens);
        pieces.clear(), places.clear();
        for (int64_t first = begin; first < end;) {
            const int64_t last = std::min(end, cu_seqlens[sequence + 1]), slot = slots[sequence],
                          position = (lengths ? lengths[slot] : 0) + first - cu_seqlens[sequence];
            pieces.push_back({sequence, slot, position, first - begin, last - first});
            for (int64_t t = 0; t < last - first; t++) places.push_back({slot, position + t, 0});
            if (last == cu_seqlens[sequence + 1]) sequence++;
            first = last;
        }
        const Block block = {pieces.data(), (int64_t)pieces.size(), places.data(), end - begin};
        forward<W>(model, end - begin, ids + begin, (char *)hidden + begin * row, buffers, threads,
                   [&](int i, float *in, Memory memory, float *out) {
                       with_mixer(model.layers[i], states[i], [&](const auto &mixer, const auto &state) {
                           mix(mixer, in, block, state, memory, out);
                       });
                   });
    }
    return 0;
}

template <class W>
static int linear_rows(const W *x, int64_t batch, int64_t depth, const W *w, int64_t rows, float *y, int threads) {
    if (!scratch.reserve(batch * (depth + arranged_size(depth)))) return 3;
    float *wide = scratch.memory, *arranged = wide + batch * depth;
    for (int64_t i = 0; i < batch * depth; i++) wide[i] = read(x + i);
#pragma omp parallel num_threads(threads)
    {
        FlushDenormals flush;
        linear<W>(wide, batch, depth, w, rows, arranged, y);
    }
    return 0;
}

// ---- what Python calls: 0, or 1: a token id is out of range, 2: a slot is, 3: out of memory, 4: more tokens than a
// slot may have, 5: the number of a page is out of range

static bool within(const int64_t *values, int64_t n, int64_t end) {
    return std::all_of(values, values + n, [=](int64_t x) { return x >= 0 && x < end; });
}

// The pages of the pool; null for a model without attention.
static const Pages *pages_of(const Model &model, const LayerState *states) {
    for (int i = 0; i < model.num_layers; i++)
        if (model.layers[i].mixer_kind == ATTENTION) return states[i].kv.pages;
    return nullptr;
}

// Whether `tokens` more have places in a slot's pages: 0 or an error.
static int check_room(const Pages &pages, int64_t slot, int64_t tokens) {
    const int64_t end = pages.lengths[slot] + tokens, used = (end + PAGE_TOKENS - 1) / PAGE_TOKENS;
    if (pages.lengths[slot] < 0 || used > pages.max_pages) return 4;
    const int32_t *blocks = pages.blocks + slot * pages.max_pages;
    return std::all_of(blocks, blocks + used, [&](int32_t n) { return n >= 0 && n <= pages.num_pages; }) ? 0 : 5;
}

// One token of each of `batch` requests. There is a state for each layer, each of `rows` rows, which moves on in place;
// so do pages, but for their lengths. `hidden` is [batch, hidden] in the weights' dtype; for a part of a model it is
// float32 and goes in as well as out, and there are no ids.
extern "C" int lowkey_decode(const Model *model, const LayerState *states, int64_t rows, int64_t batch,
                             const int64_t *ids, const int64_t *slots, void *hidden, int threads) try {
    if (!model->is_part() && !within(ids, batch, model->vocab)) return 1;
    if (!within(slots, batch, rows)) return 2;
    const Pages *pages = pages_of(*model, states);
    std::vector<Place> places;
    int64_t parts = 0;
    for (int64_t b = 0; b < batch; b++) {
        if (const int error = pages ? check_room(*pages, slots[b], 1) : 0) return error;
        const int64_t position = pages ? pages->lengths[slots[b]] : 0;
        places.push_back({slots[b], position, parts});
        parts += position / PART_TOKENS + 1;
    }
    places.push_back({0, 0, parts});
    return (model->bf16_weights ? decode<bf16> : decode<float>)(*model, states, batch, places.data(), ids, hidden,
                                                                threads);
} catch (const std::bad_alloc &) {
    return 3;
}

// Packed sequences whose slots are of `rows` rows. Delta states are float32, a row for each sequence; pages are the
// pool's. `hidden` is as above, [tokens, hidden].
extern "C" int lowkey_prefill(const Model *model, const LayerState *states, int64_t rows, int64_t sequences,
                              const int64_t *cu_seqlens, const int64_t *ids, const int64_t *slots, void *hidden,
                              int threads) try {
    if (!model->is_part() && !within(ids, cu_seqlens[sequences], model->vocab)) return 1;
    if (!within(slots, sequences, rows)) return 2;
    const Pages *pages = pages_of(*model, states);
    for (int64_t i = 0; pages && i < sequences; i++)
        if (const int error = check_room(*pages, slots[i], cu_seqlens[i + 1] - cu_seqlens[i])) return error;
    return (model->bf16_weights ? prefill<bf16> : prefill<float>)(*model, states, sequences, cu_seqlens, ids, slots,
                                                                  pages ? pages->lengths : nullptr, hidden, threads);
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

// The sizes of the structures, with which layer.py compares those of its mirrors.
extern "C" const int64_t lowkey_layout[] = {sizeof(Model),     sizeof(Layer),      sizeof(Delta),
                                            sizeof(Attention), sizeof(Mlp),        sizeof(Moe),
                                            sizeof(Pages),     sizeof(DeltaState), sizeof(PagedKV)};
