// The dense feed-forward.
#pragma once

#include "products.h"

struct Mlp {
    const void *in_proj, *out_proj; // row major, in the weights' dtype; rows of in_proj: gate | up
    int32_t intermediate;

    int64_t width() const { return 2 * (int64_t)intermediate; }
};

// Computes SwiGLU of one row of the input projection.
static inline void swiglu(const float *in, int64_t intermediate, float *out) {
    const float *gate = in, *up = in + intermediate;
    for (int64_t j = 0; j < intermediate; j++) out[j] = silu(gate[j]) * up[j];
}

// What `feed_forward` works in.
struct MlpMemory {
    Carver memory;
    float *in, *out, *arranged;

    MlpMemory(const Mlp &mlp, int64_t n, int64_t hidden, float *base)
        : memory{base}, in(memory.take(n * mlp.width())), out(memory.take(n * mlp.intermediate)),
          arranged(memory.take(n * arranged_size(std::max<int64_t>(hidden, mlp.intermediate)))) {}
};

// Does everything behind the arrangement of x in memory.arranged.
template <class W>
static void feed_forward_arranged(const Mlp &mlp, int64_t n, int64_t hidden, const MlpMemory &memory, float *y) {
    product(memory.arranged, n, hidden, (const W *)mlp.in_proj, mlp.width(), memory.in);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < n; b++)
        swiglu(memory.in + b * mlp.width(), mlp.intermediate, memory.out + b * mlp.intermediate);
    linear<W>(memory.out, n, mlp.intermediate, mlp.out_proj, hidden, memory.arranged, y);
}

// Computes y of n tokens x [n, hidden]; both may be the same. Every thread of a team calls it.
template <class W>
static void feed_forward(const Mlp &mlp, const float *x, int64_t n, int64_t hidden, float *base, float *y) {
    const MlpMemory memory(mlp, n, hidden, base);
    arrange<W>(x, n, hidden, memory.arranged);
    feed_forward_arranged<W>(mlp, n, hidden, memory, y);
}
