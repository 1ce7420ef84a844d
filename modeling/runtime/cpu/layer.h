// A model's layers, each a mixer and a feed-forward of a kind, as compiled.py hands them over.
#pragma once

#include "delta.h"
#include "mlp.h"

struct Layer {
    const float *mixer_norm, *ffn_norm; // [hidden]
    float norm_eps;
    Delta mixer;
    Mlp ffn;
};

// A whole model; or, without embeddings, some of its layers, whose hidden states go in and out in float32.
struct Model {
    const void *embeddings; // [vocab, hidden], in the weights' dtype; null for a part
    const float *norm;      // [hidden]
    const Layer *layers;
    float norm_eps;
    int32_t num_layers, hidden, vocab, bf16_weights;

    bool is_part() const { return !embeddings; }
};
