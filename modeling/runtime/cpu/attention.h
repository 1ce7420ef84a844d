// Softmax attention: its parameters, its keys and values in pages as attention.py hands them over, and what both of its
// forms share.
#pragma once

#include "batch.h"
#include "products.h"

enum QkNorm : int32_t { NO_NORM, HEAD_NORM, WHOLE_NORM };
enum KVType : int32_t { FLOAT32_KV, BFLOAT16_KV };

struct Attention {
    const void *in_proj, *o_proj; // row major, in the weights' dtype; rows of in_proj: q | k | v | gate
    const float *q_norm, *k_norm; // [head_dim], or of all heads; null without norms
    const double *frequencies;    // [rotary_dims / 2], radians per position
    float norm_eps;
    int32_t num_heads, num_kv_heads, head_dim, rotary_dims, qk_norm, gated;

    int groups() const { return num_heads / num_kv_heads; }
    int64_t outputs() const { return (int64_t)num_heads * head_dim; }
    int64_t keys_at() const { return outputs(); }
    int64_t keys() const { return (int64_t)num_kv_heads * head_dim; }
    int64_t gate_at() const { return outputs() + 2 * keys(); }
    int64_t width() const { return gate_at() + (gated ? outputs() : 0); }

    // Writes o [head_dim] of a query head, given its token's row of the input projection, after its output gate.
    void finish(const float *in, int64_t head, const float *o, float scale, float *out) const {
        const float *z = in + gate_at() + head * head_dim;
        for (int i = 0; i < head_dim; i++) out[i] = o[i] * scale;
        if (gated)
            for (int i = 0; i < head_dim; i++) out[i] *= sigmoid(z[i]);
    }
};

// The keys and values of one layer.
struct PagedKV {
    void *keys, *values; // [num_pages + 1, num_kv_heads, PAGE_TOKENS, head_dim]
    const Pages *pages;
    int32_t type;
};

// One head's keys or values of a slot, page by page.
template <class K> struct Head {
    K *data;
    const int32_t *blocks;
    int64_t head, num_kv_heads, page_size;

    Head(void *data, const Attention &l, const Pages &pages, int64_t slot, int64_t head)
        : data((K *)data), blocks(pages.blocks + slot * pages.max_pages), head(head), num_kv_heads(l.num_kv_heads),
          page_size((int64_t)PAGE_TOKENS * l.head_dim) {}
    K *page(int64_t i) const { return data + (blocks[i] * num_kv_heads + head) * page_size; }
};

// ---- a token's query and key, before any attention

static inline void normalise(float *x, const float *weight, float eps, int n) {
    const float scale = 1.0f / std::sqrt(sum_of_squares(x, n) / n + eps);
    for (int i = 0; i < n; i++) x[i] *= scale * weight[i];
}

// Rotates the first channels of `heads` heads. Angles are float64: in float32 one of position 262,143 would be off by a
// hundredth.
static inline void rotate(const Attention &l, int64_t position, float *x, int64_t heads) {
    const int half = l.rotary_dims / 2;
    for (int c = 0; c < half; c++) {
        const double angle = position * l.frequencies[c];
        const float cos = std::cos(angle), sin = std::sin(angle);
        for (float *a = x + c, *end = a + heads * l.head_dim; a < end; a += l.head_dim) {
            const float before = a[0];
            a[0] = before * cos - a[half] * sin;
            a[half] = a[half] * cos + before * sin;
        }
    }
}

// Finishes q (times the softmax's scale) and k of each token in place, and writes k and v to their page. Every thread
// of a team calls it.
template <class K>
static void append(const Attention &l, float *in, const Place *places, int64_t tokens, const PagedKV &kv) {
    const int d = l.head_dim;
    const float scale = 1.0f / std::sqrt((float)d);
#pragma omp for schedule(static)
    for (int64_t b = 0; b < tokens; b++) {
        const auto [slot, position, _] = places[b];
        float *q = in + b * l.width(), *k = q + l.keys_at(), *v = k + l.keys();
        if (l.qk_norm == WHOLE_NORM) {
            normalise(q, l.q_norm, l.norm_eps, l.outputs());
            normalise(k, l.k_norm, l.norm_eps, l.keys());
        }
        if (l.qk_norm == HEAD_NORM) {
            for (int h = 0; h < l.num_heads; h++) normalise(q + h * d, l.q_norm, l.norm_eps, d);
            for (int h = 0; h < l.num_kv_heads; h++) normalise(k + h * d, l.k_norm, l.norm_eps, d);
        }
        rotate(l, position, q, l.num_heads + l.num_kv_heads); // keys follow the queries
        for (int64_t i = 0; i < l.outputs(); i++) q[i] *= scale;
        for (int64_t h = 0; h < l.num_kv_heads; h++) {
            const int64_t page = position / PAGE_TOKENS, row = position % PAGE_TOKENS * d;
            K *keys = Head<K>(kv.keys, l, *kv.pages, slot, h).page(page) + row;
            K *values = Head<K>(kv.values, l, *kv.pages, slot, h).page(page) + row;
            for (int i = 0; i < d; i++) write(keys + i, k[h * d + i]);
            for (int i = 0; i < d; i++) write(values + i, v[h * d + i]);
        }
    }
}

// ---- rows of queries and the keys and values of one page

// Computes scores [rows][PAGE_TOKENS] of rows of queries, as `arrange_tile` left them, and the page's first `count`
// keys. Whole tiles are computed, so what lies behind those in the page may be read too, and scores of it written.
template <class K>
static void score_page(const float *q, int64_t rows, int d, const K *keys, int count, float *scores) {
    product_rows(q, rows, d, keys, PAGE_TOKENS, 0, count, scores, PAGE_TOKENS);
}

// A row of the online softmax: the largest score so far, and the sum of exp(score - largest).
struct Softmax {
    float largest, sum;

    // Turns the next `count` scores into exp(score - largest). Returns what all before are to be multiplied by.
    float advance(float *scores, int count) {
        float most = largest;
#pragma omp simd reduction(max : most)
        for (int j = 0; j < count; j++) most = scores[j] > most ? scores[j] : most;
        const float factor = exp32(largest - most);
        for (int j = 0; j < count; j++) scores[j] = exp32(scores[j] - most);
        float added = 0;
#pragma omp simd reduction(+ : added)
        for (int j = 0; j < count; j++) added += scores[j];
        largest = most;
        sum = sum * factor + added;
        return factor;
    }
};
constexpr Softmax NOTHING_YET = {-INFINITY, 0};

// Computes o = factor o + p V for R rows of p [R][PAGE_TOKENS] and VECTORS vectors of columns.
template <int R, int VECTORS, class K>
static inline void add_values(const float *p, const float *factor, const K *values, int64_t d, int count, float *o) {
    vec sum[R][VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) sum[r][v] = load(o + r * d + v * LANES) * factor[r];
    for (int j = 0; j < count; j++, values += d) {
        vec value[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) value[v] = load(values + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; v++)
                sum[r][v] = multiply_add(sum[r][v], value[v], p[r * PAGE_TOKENS + j] - vec{});
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; v++) store(o + r * d + v * LANES, sum[r][v]);
}

// Does the same for R rows and all columns.
template <int R, class K>
static void add_values(const float *p, const float *factor, const K *values, int64_t d, int count, float *o) {
    constexpr int VECTORS = (LANES == 16 ? 16 : 8) / R; // sums that registers hold
    int64_t c = 0;
    for (; c + VECTORS * LANES <= d; c += VECTORS * LANES)
        add_values<R, VECTORS>(p, factor, values + c, d, count, o + c);
    for (; c + LANES <= d; c += LANES) add_values<R, 1>(p, factor, values + c, d, count, o + c);
    for (; c < d; c++)
        for (int r = 0; r < R; r++) {
            float sum = o[r * d + c] * factor[r];
            for (int j = 0; j < count; j++) sum = multiply_add(sum, read(values + j * d + c), p[r * PAGE_TOKENS + j]);
            o[r * d + c] = sum;
        }
}

// Does the same for all rows. An element's sum is the same bits whichever rows are computed together.
template <class K>
static void add_page(const float *p, const float *factor, int rows, const K *values, int64_t d, int count, float *o) {
    int r = 0;
    auto run = [&](auto R) {
        for (; r + R <= rows; r += R) add_values<R>(p + r * PAGE_TOKENS, factor + r, values, d, count, o + r * d);
    };
    if constexpr (LANES == 16) run(std::integral_constant<int, 8>());
    run(std::integral_constant<int, 4>());
    run(std::integral_constant<int, 2>());
    run(std::integral_constant<int, 1>());
}
