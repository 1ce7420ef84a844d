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

struct Model {
    const void *embeddings; // [vocab, hidden], in the weights' dtype
    const float *norm;
    const Layer *layers;
    float norm_eps;
    int32_t num_layers, hidden, vocab, bf16_weights;
};
