// A model's layers, each a mixer and a feed-forward of a kind, as layer.py hands them over. Only this file knows which
// kinds there are; a header that gives a kind has overloads of the same functions for it:
//     mixers (in_proj, o_proj, width() and outputs(), the columns of both projections): mix for a step and for a block,
//         and step_floats, shared_step_floats, piece_floats and shared_piece_floats, what they work in;
//     feed-forwards: feed_forward, and the memory that it works in.
#pragma once

#include "attention_prefill.h"
#include "attention_step.h"
#include "delta_prefill.h"
#include "delta_step.h"
#include "mlp.h"
#include "moe.h"

enum MixerKind : int32_t { DELTA, ATTENTION };
enum FeedForwardKind : int32_t { MLP, MOE };

union AnyMixer {
    Delta delta;
    Attention attention;
};
union AnyFeedForward {
    Mlp mlp;
    Moe moe;
};
// The states of one layer: of all slots of a pool or, where they are delta states in a prefill, of its sequences.
union LayerState {
    DeltaState delta;
    PagedKV kv;
};

struct Layer {
    const float *mixer_norm, *ffn_norm; // [hidden]
    float norm_eps;
    int32_t norm_after; // whether the norms are of what mixer and feed-forward give, not of what they get
    int32_t mixer_kind, ffn_kind;
    AnyMixer mixer;
    AnyFeedForward ffn;
};

// Calls f(mixer), with a state f(mixer, state), both as what they are.
template <class F> static inline auto with_mixer(const Layer &l, F f) {
    return l.mixer_kind == ATTENTION ? f(l.mixer.attention) : f(l.mixer.delta);
}
template <class F> static inline auto with_mixer(const Layer &l, const LayerState &state, F f) {
    return l.mixer_kind == ATTENTION ? f(l.mixer.attention, state.kv) : f(l.mixer.delta, state.delta);
}
// Calls f(feed-forward) likewise.
template <class F> static inline auto with_ffn(const Layer &l, F f) {
    return l.ffn_kind == MOE ? f(l.ffn.moe) : f(l.ffn.mlp);
}
static inline int64_t ffn_floats(const Mlp &mlp, int64_t n, int64_t hidden) {
    return MlpMemory(mlp, n, hidden, nullptr).memory.used;
}
static inline int64_t ffn_floats(const Moe &moe, int64_t n, int64_t hidden) {
    return MoeMemory(moe, n, hidden, nullptr).memory.used;
}

// A whole model; or, without embeddings, some of its layers, whose hidden states go in and out in float32.
struct Model {
    const void *embeddings; // [vocab, hidden], in the weights' dtype; null for a part
    const float *norm;      // [hidden]
    const Layer *layers;
    float norm_eps;
    int32_t num_layers, hidden, vocab, bf16_weights;

    bool is_part() const { return !embeddings; }
};
