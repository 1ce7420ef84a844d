// Attention of one token of each of B requests.
//
// A request's keys are read in parts of PART_TOKENS, from position 0 on, whatever else runs and on however many
// threads: each part gives a sum of its own, and those are added in order. So a request's result is always the same
// bits.
#pragma once

#include "attention.h"

// How many floats `mix` works in: each thread by itself, and all together on a step of so many parts.
static inline size_t step_floats(const Attention &l) {
    return l.groups() * (arranged_size(l.head_dim) + PAGE_TOKENS + 1);
}
static inline size_t part_floats(const Attention &l) { return l.groups() * ((size_t)l.head_dim + 2); }
static inline size_t shared_step_floats(const Attention &l, int64_t parts) {
    return parts * l.num_kv_heads * part_floats(l);
}

// Computes the queries of one kv head, q [groups][head_dim], over the keys from position `from` up to `to`. `part` gets
// o [groups][head_dim], not divided yet, and the softmax of each query.
template <class K>
static void attend_part(const Attention &l, const float *q, const Head<K> &keys, const Head<K> &values, int64_t from,
                        int64_t to, float *own, float *part) {
    const int d = l.head_dim, groups = l.groups();
    const int64_t size = arranged_row<K>(d);
    float *arranged = own, *scores = arranged + groups * arranged_size(d), *factor = scores + groups * PAGE_TOKENS;
    Softmax *softmax = (Softmax *)(part + groups * d);
    for_tiles(0, groups, [&](int64_t m, auto width) {
        arrange_tile<width, K>([&](int i) { return q + (m + i) * d; }, d, arranged + m * size);
    });
    std::fill_n(part, groups * d, 0.0f);
    std::fill_n(softmax, groups, NOTHING_YET);
    for (int64_t first = from; first < to; first += PAGE_TOKENS) {
        const int64_t page = first / PAGE_TOKENS;
        const int count = std::min<int64_t>(PAGE_TOKENS, to - first);
        score_page(arranged, groups, d, keys.page(page), count, scores);
        for (int g = 0; g < groups; g++) factor[g] = softmax[g].advance(scores + g * PAGE_TOKENS, count);
        add_page(scores, factor, groups, values.page(page), d, count, part);
    }
}

// Adds up the parts of one query head; `step` is from part to part.
static void add_parts(const Attention &l, const float *in, int64_t head, int64_t parts, const float *part, size_t step,
                      float *out) {
    const int d = l.head_dim, groups = l.groups(), g = head % groups;
    auto softmax = [&](int64_t i) { return ((const Softmax *)(part + i * step + groups * d))[g]; };
    Softmax all = softmax(0);
    for (int64_t i = 1; i < parts; i++) all.largest = std::max(all.largest, softmax(i).largest);
    all.sum = 0;
    std::fill_n(out, d, 0.0f);
    for (int64_t i = 0; i < parts; i++) {
        const float *o = part + i * step + g * d, factor = exp32(softmax(i).largest - all.largest);
        for (int c = 0; c < d; c++) out[c] += factor * o[c];
        all.sum += factor * softmax(i).sum;
    }
    l.finish(in, head, out, 1.0f / all.sum, out);
}

// Every thread of a team calls it.
template <class K>
static void mix_rows(const Attention &l, float *in, const Place *places, int64_t batch, const PagedKV &kv,
                     Memory memory, float *out) {
    append<K>(l, in, places, batch, kv);
    const size_t part_size = part_floats(l), step = l.num_kv_heads * part_size;
    const int64_t parts = places[batch].parts_before; // a last place behind those of the batch ends the last row
#pragma omp for schedule(static)
    for (int64_t i = 0; i < parts * l.num_kv_heads; i++) {
        const int64_t part = i / l.num_kv_heads, head = i % l.num_kv_heads;
        const Place *row = std::upper_bound(places, places + batch, part,
                                            [](int64_t n, const Place &p) { return n < p.parts_before; }) -
                           1;
        const int64_t from = (part - row->parts_before) * PART_TOKENS,
                      to = std::min(from + PART_TOKENS, row->position + 1);
        attend_part<K>(l, in + (row - places) * l.width() + head * l.groups() * l.head_dim,
                       {kv.keys, l, *kv.pages, row->slot, head}, {kv.values, l, *kv.pages, row->slot, head}, from, to,
                       memory.own, memory.shared + i * part_size);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < batch * l.num_heads; i++) {
        const int64_t b = i / l.num_heads, head = i % l.num_heads, first = places[b].parts_before;
        add_parts(l, in + b * l.width(), head, places[b + 1].parts_before - first,
                  memory.shared + first * step + head / l.groups() * part_size, step,
                  out + b * l.outputs() + head * l.head_dim);
    }
}

static void mix(const Attention &l, float *in, const Place *places, int64_t batch, const PagedKV &kv, Memory memory,
                float *out) {
    (kv.type == BFLOAT16_KV ? mix_rows<bf16> : mix_rows<float>)(l, in, places, batch, kv, memory, out);
}
