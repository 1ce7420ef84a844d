// Attention over the tokens of packed sequences, which read the keys and values of earlier calls where they lie.
#pragma once

#include "attention.h"

// Rows of queries, all heads of a group of neighbouring tokens, that share each read of a page.
constexpr int QUERY_ROWS = 64;

// Tokens whose queries are computed together, and their rows with those that fill the last tile. Whole tiles only: so a
// row is the same bits however a sequence is cut.
static inline int query_tokens(const Attention &l) { return std::max(1, QUERY_ROWS / l.groups()); }
static inline int64_t query_rows(const Attention &l) { return round_up(query_tokens(l) * l.groups(), WIDE); }

// How many floats `mix` works in: each thread by itself, and all together.
static inline size_t piece_floats(const Attention &l) {
    return query_rows(l) * (arranged_size(l.head_dim) + PAGE_TOKENS + l.head_dim + 3) + l.head_dim;
}
static inline size_t shared_piece_floats(const Attention &) { return 0; }

// Computes one kv head's queries of `tokens` tokens of a piece, from its token `first` on. `in` and `out` are the
// piece's.
template <class K>
static void attend_queries(const Attention &l, const float *in, const Piece &piece, int64_t first, int64_t tokens,
                           int64_t head, const PagedKV &kv, float *own, float *out) {
    const int d = l.head_dim, groups = l.groups(), rows = tokens * groups;
    const int64_t size = arranged_row<K>(d), most = query_rows(l), position = piece.position + first;
    auto take = [&](int64_t n) { return std::exchange(own, own + n); };
    float *arranged = take(most * arranged_size(d)), *scores = take(most * PAGE_TOKENS), *o = take(most * d),
          *factor = take(most), *zeros = take(d);
    Softmax *softmax = (Softmax *)take(2 * most);
    std::fill_n(o, rows * d, 0.0f);
    std::fill_n(zeros, d, 0.0f);
    std::fill_n(softmax, rows, NOTHING_YET);
    for (int64_t m = 0; m < rows; m += WIDE)
        arrange_tile<WIDE, K>(
            [&](int i) {
                const int64_t row = m + i, token = first + row / groups;
                return row < rows ? in + token * l.width() + (head * groups + row % groups) * d : zeros;
            },
            d, arranged + m * size);
    const Head<K> keys(kv.keys, l, *kv.pages, piece.slot, head), values(kv.values, l, *kv.pages, piece.slot, head);
    for (int64_t page = 0; page * PAGE_TOKENS < position + tokens; page++) {
        const int count = std::min<int64_t>(PAGE_TOKENS, position + tokens - page * PAGE_TOKENS);
        score_page(arranged, round_up(rows, WIDE), d, keys.page(page), count, scores);
        for (int r = 0; r < rows; r++) {
            // The keys up to the token's own.
            const int64_t seen = position + r / groups + 1 - page * PAGE_TOKENS;
            const int own_count = std::clamp<int64_t>(seen, 0, count);
            factor[r] = own_count ? softmax[r].advance(scores + r * PAGE_TOKENS, own_count) : 1.0f;
            std::fill_n(scores + r * PAGE_TOKENS + own_count, count - own_count, 0.0f);
        }
        add_page(scores, factor, rows, values.page(page), d, count, o);
    }
    for (int r = 0; r < rows; r++) {
        const int64_t token = first + r / groups, query = head * groups + r % groups;
        l.finish(in + token * l.width(), query, o + r * d, 1.0f / softmax[r].sum,
                 out + token * l.outputs() + query * d);
    }
}

// Every thread of a team calls it.
template <class K>
static void mix_block(const Attention &l, float *in, const Block &block, const PagedKV &kv, Memory memory, float *out) {
    append<K>(l, in, block.places, block.tokens, kv);
    const int64_t most = query_tokens(l);
    auto blocks = [&](const Piece &p) { return (p.tokens + most - 1) / most * l.num_kv_heads; };
    int64_t items = 0;
    for (int64_t i = 0; i < block.num_pieces; i++) items += blocks(block.pieces[i]);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < items; i++) {
        const Piece *piece = block.pieces;
        int64_t at = i;
        for (; at >= blocks(*piece); piece++) at -= blocks(*piece);
        const int64_t first = at / l.num_kv_heads * most;
        attend_queries<K>(l, in + piece->first * l.width(), *piece, first, std::min(most, piece->tokens - first),
                          at % l.num_kv_heads, kv, memory.own, out + piece->first * l.outputs());
    }
}

static void mix(const Attention &l, float *in, const Block &block, const PagedKV &kv, Memory memory, float *out) {
    (kv.type == BFLOAT16_KV ? mix_block<bf16> : mix_block<float>)(l, in, block, kv, memory, out);
}
