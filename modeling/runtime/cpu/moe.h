// The mixture of experts: each token takes the experts that the router likes best, and one that all take.
//
// Tokens are sorted by expert, so that each expert that is taken is read once and multiplied by all its tokens. Threads
// share out strips of rows of all the experts' matrices: a decode step of few tokens keeps all of them at work.
#pragma once

#include "mlp.h"

struct Moe {
    const void *router;             // [router_rows, hidden]: a row for each expert, then the shared expert's gate
    const void *in_proj, *out_proj; // [num_experts, 2 expert_size, hidden], [num_experts, hidden, expert_size]
    Mlp shared;
    int32_t router_rows, num_experts, top_k, expert_size;
};

// Rows of an expert's matrix that one thread takes at a time.
constexpr int64_t EXPERT_ROWS = 2 * STRIP;

// What `feed_forward` works in. A choice is one of the experts of one token.
struct MoeMemory {
    Carver memory;
    MlpMemory shared;
    float *scores;       // [n, router_rows]
    float *weights;      // [n, top_k]
    int32_t *experts;    // [n, top_k]
    int32_t *row_of;     // [n, top_k], the choice's row once choices are sorted by expert
    int32_t *token_of;   // [n top_k], a row's token
    int32_t *first_row;  // [num_experts + 1]
    int32_t *hit;        // [num_experts + 1]: how many experts are taken, and which
    float *arranged;     // [n top_k] rows, what goes into an expert's products
    float *in, *out, *y; // [n top_k] rows

    MoeMemory(const Moe &moe, int64_t n, int64_t hidden, float *base)
        : memory{base}, shared(moe.shared, n, hidden, base) {
        const int64_t choices = n * moe.top_k, size = moe.expert_size;
        auto integers = [&](int64_t count) { return (int32_t *)memory.take(count); };
        memory.take(shared.memory.used);
        scores = memory.take(n * moe.router_rows), weights = memory.take(choices);
        experts = integers(choices), row_of = integers(choices), token_of = integers(choices);
        first_row = integers(moe.num_experts + 1), hit = integers(moe.num_experts + 1);
        arranged = memory.take(choices * arranged_size(std::max(hidden, size)));
        in = memory.take(choices * 2 * size), out = memory.take(choices * size), y = memory.take(choices * hidden);
    }
};

// Chooses the top_k experts of one token, the best first and of equal ones the first, and their weights, which add up
// to 1: the softmax over all experts, of which those not taken cancel out. What is NaN is chosen or not, but valid.
static void choose(const Moe &moe, const float *scores, int32_t *experts, float *weights) {
    int count = 0;
    for (int e = 0; e < moe.num_experts; e++) {
        int at = count;
        while (at > 0 && scores[e] > weights[at - 1]) at--;
        if (at == moe.top_k) continue;
        count = std::min(count + 1, moe.top_k);
        for (int i = count - 1; i > at; i--) experts[i] = experts[i - 1], weights[i] = weights[i - 1];
        experts[at] = e, weights[at] = scores[e];
    }
    float sum = 0;
    const float most = weights[0];
    for (int i = 0; i < moe.top_k; i++) sum += weights[i] = exp32(weights[i] - most);
    for (int i = 0; i < moe.top_k; i++) weights[i] /= sum;
}

static void sort_by_expert(const Moe &moe, int64_t n, const MoeMemory &m) {
    const int64_t choices = n * moe.top_k;
    int32_t *next = m.first_row;
    std::fill_n(next, moe.num_experts + 1, 0);
    for (int64_t i = 0; i < choices; i++) next[m.experts[i] + 1]++;
    m.hit[0] = 0;
    for (int e = 0; e < moe.num_experts; e++) {
        if (next[e + 1]) m.hit[++m.hit[0]] = e;
        next[e + 1] += next[e];
    }
    for (int64_t i = 0; i < choices; i++) {
        const int32_t row = next[m.experts[i]]++;
        m.row_of[i] = row;
        m.token_of[row] = i / moe.top_k;
    }
    // Each has become the next one's.
    for (int e = moe.num_experts; e > 0; e--) next[e] = next[e - 1];
    next[0] = 0;
}

// Arranges row(i) of each row of choices. Every thread of a team calls it.
template <class W, class Row> static void arrange_experts(const MoeMemory &m, int64_t depth, Row row) {
    const int64_t size = arranged_row<W>(depth);
#pragma omp for schedule(dynamic)
    for (int i = 1; i <= m.hit[0]; i++)
        for_tiles(m.first_row[m.hit[i]], m.first_row[m.hit[i] + 1], [&](int64_t first, auto width) {
            arrange_tile<width, W>([&](int j) { return row(first + j); }, depth, m.arranged + first * size);
        });
}

// Multiplies the arranged rows of each expert that is taken by its matrix of w [num_experts, rows, depth].
template <class W> static void multiply_experts(const MoeMemory &m, int64_t depth, const W *w, int64_t rows, float *y) {
    const int64_t strips = (rows + EXPERT_ROWS - 1) / EXPERT_ROWS;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < m.hit[0] * strips; i++) {
        const int64_t e = m.hit[1 + i / strips], from = i % strips * EXPERT_ROWS, row = m.first_row[e];
        product_rows(m.arranged + row * arranged_row<W>(depth), m.first_row[e + 1] - row, depth, w + e * rows * depth,
                     rows, from, std::min(rows, from + EXPERT_ROWS), y + row * rows, rows);
    }
}

// Computes y of n tokens x [n, hidden]; both may be the same. Every thread of a team calls it.
template <class W>
static void feed_forward(const Moe &moe, const float *x, int64_t n, int64_t hidden, float *base, float *y) {
    const MoeMemory m(moe, n, hidden, base);
    const int64_t choices = n * moe.top_k, size = moe.expert_size;
    linear<W>(x, n, hidden, moe.router, moe.router_rows, m.shared.arranged, m.scores);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < n; b++)
        choose(moe, m.scores + b * moe.router_rows, m.experts + b * moe.top_k, m.weights + b * moe.top_k);
#pragma omp single
    sort_by_expert(moe, n, m);

    arrange_experts<W>(m, hidden, [&](int64_t row) { return x + m.token_of[row] * hidden; });
    feed_forward_arranged<W>(moe.shared, n, hidden, m.shared, y);
    multiply_experts(m, hidden, (const W *)moe.in_proj, 2 * size, m.in);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < choices; i++) swiglu(m.in + i * 2 * size, size, m.out + i * size);
    arrange_experts<W>(m, size, [&](int64_t row) { return m.out + row * size; });
    multiply_experts(m, size, (const W *)moe.out_proj, hidden, m.y);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < n; b++) {
        float *const sum = y + b * hidden;
        const float gate = sigmoid(m.scores[b * moe.router_rows + moe.num_experts]);
        for (int64_t i = 0; i < hidden; i++) sum[i] *= gate;
        for (int64_t c = b * moe.top_k; c < (b + 1) * moe.top_k; c++)
            for (int64_t i = 0; i < hidden; i++) sum[i] += m.weights[c] * m.y[m.row_of[c] * hidden + i];
    }
}
