// The dense feed-forward.
#pragma once

#include "vectors.h"

struct Mlp {
    const void *in_proj, *out_proj; // row major, in the weights' dtype; rows of in_proj: gate | up
    int32_t intermediate;

    int64_t width() const { return 2 * (int64_t)intermediate; }
};

// Computes SwiGLU of n rows of the input projection. Every thread of a team calls it.
static void swiglu(const Mlp &mlp, const float *in, int64_t n, float *out) {
    const int64_t inner = mlp.intermediate;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < n; b++) {
        const float *gate = in + b * 2 * inner, *up = gate + inner;
        for (int64_t j = 0; j < inner; j++) out[b * inner + j] = silu(gate[j]) * up[j];
    }
}
