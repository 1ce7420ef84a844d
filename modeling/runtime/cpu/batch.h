// What a call computes: which tokens, of which requests, and where each request's state is.
#pragma once

#include <cstdint>

// Tokens of a page of keys and values, as modeling/state/pages.py has them.
constexpr int PAGE_TOKENS = 64;
// Tokens of a part. In a decode step a request's earlier tokens are read in parts, which threads may share.
constexpr int PART_TOKENS = 4 * PAGE_TOKENS;

// One token: the slot of its request, its position there, and the number of parts of all rows of the step before it.
struct Place {
    int64_t slot, position, parts_before;
};

// Consecutive tokens of one sequence: rows `first` to `first + tokens` of a block, from `position` on in their request.
struct Piece {
    int64_t sequence, slot, position, first, tokens;
};

// The tokens of a prefill that go through a layer together.
struct Block {
    const Piece *pieces;
    int64_t num_pieces;
    const Place *places; // of each token
    int64_t tokens;
};

// Memory that a mixer works in: each thread's own, and the team's.
struct Memory {
    float *own, *shared;
};

// The pages of a pool, which all attention layers share. Beyond a slot's own pages stands the null page, number
// num_pages; the null slot, the last, has no other.
struct Pages {
    const int32_t *blocks;  // [slots + 1, max_pages], numbers of pages
    const int32_t *lengths; // [slots + 1], tokens before the call
    int64_t max_pages, num_pages;
};
