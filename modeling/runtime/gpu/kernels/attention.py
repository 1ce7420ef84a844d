"""Triton kernels of softmax attention over pages: for prompts, and what decode steps share with them
(`modeling.runtime.gpu.kernels.attention_step`). `modeling.runtime.gpu.attention` launches them and says what they
compute.

A slot's keys and values lie in pages (`modeling.state.PagedKV`), whose numbers are in the slot's row of `table`, and
how many tokens it has had before this step is in `lengths`. Both are read on the device, so that nothing about a launch
depends on them. Where the table has no column for a token, which happens to the null slot only, its last one serves.

A block is some consecutive tokens within a page: the keys and values that a program reads at a time. The softmax is
the online one of FlashAttention (arXiv 2205.14135) in float32, with powers of two in the place of those of e.
"""

import triton
import triton.language as tl

from modeling.runtime.gpu.kernels.dots import dot


@triton.jit(do_not_specialize=["width"])
def prepare_heads(
    projected,  # [tokens, ...], rows that begin with `q | k | v`
    q,  # [tokens, num_heads, head_dim], written
    keys,  # [pages, num_kv_heads, page_tokens, head_dim], written
    values,  # like keys, written
    table,  # [slots, width]
    lengths,  # [slots]
    slots,  # [sequences]
    offsets,  # [sequences + 1], or None: each token is a sequence of its own
    chunks,  # [programs / chunk, 2]: sequence, chunk of it; or None
    q_weight,
    k_weight,
    frequencies,  # [rope_dims / 2], or None
    row_stride,
    width,
    norm_eps,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    qk_norm: tl.constexpr,
    rope_dims: tl.constexpr,
    page_tokens: tl.constexpr,
    chunk: tl.constexpr,
    block_q: tl.constexpr,
    block_kv: tl.constexpr,
    block_d: tl.constexpr,
):
    """The query heads of a token, or its key and value heads, to a program."""
    if chunks is None:
        row = tl.program_id(0).to(tl.int64)
        sequence = row
        index = 0
    else:
        piece = tl.program_id(0) // chunk
        sequence = tl.load(chunks + 2 * piece)
        index = tl.load(chunks + 2 * piece + 1).to(tl.int32) * chunk + tl.program_id(0) % chunk
        row = tl.load(offsets + sequence) + index
        if row >= tl.load(offsets + sequence + 1):
            return
    slot = tl.load(slots + sequence)
    position = tl.load(lengths + slot) + index
    projected += row * row_stride
    channel = tl.arange(0, block_d)[None, :]
    if tl.program_id(1) == 0:
        q_head = tl.arange(0, block_q)[:, None]
        q_new = normed_and_rotated(
            projected, q_weight, frequencies, position, norm_eps, num_heads, head_dim, qk_norm, rope_dims,
            block_q, block_d,
        )  # fmt: skip
        target = q + (row * num_heads + q_head) * head_dim + channel
        tl.store(target, q_new.to(q.dtype.element_ty), mask=(q_head < num_heads) & (channel < head_dim))
    else:
        head = tl.arange(0, block_kv)[:, None]
        mask = (head < num_kv_heads) & (channel < head_dim)
        k_new = normed_and_rotated(
            projected + num_heads * head_dim, k_weight, frequencies, position, norm_eps, num_kv_heads,
            head_dim, qk_norm, rope_dims, block_kv, block_d,
        )  # fmt: skip
        source = projected + (num_heads + num_kv_heads) * head_dim + head * head_dim + channel
        v_new = tl.load(source, mask=mask, other=0.0)
        column = tl.minimum(position // page_tokens, width - 1)
        page = tl.load(table + slot * width + column).to(tl.int64)
        place = (page * num_kv_heads + head) * page_tokens + position % page_tokens
        tl.store(keys + place * head_dim + channel, k_new.to(keys.dtype.element_ty), mask=mask)
        tl.store(values + place * head_dim + channel, v_new.to(values.dtype.element_ty), mask=mask)


@triton.jit
def normed_and_rotated(
    x,  # [heads, head_dim]
    weight,
    frequencies,
    position,
    eps,
    heads: tl.constexpr,
    head_dim: tl.constexpr,
    qk_norm: tl.constexpr,
    rope_dims: tl.constexpr,
    block_h: tl.constexpr,
    block_d: tl.constexpr,
):
    """The queries or keys of a token, float32 `[block_h, block_d]`."""
    half: tl.constexpr = rope_dims // 2
    head = tl.arange(0, block_h)[:, None]
    channel = tl.arange(0, block_d)[None, :]
    mask = (head < heads) & (channel < head_dim)
    y = tl.load(x + head * head_dim + channel, mask=mask, other=0.0).to(tl.float32)
    scale = tl.full([block_h, 1], 1.0, tl.float32)
    if qk_norm == "head":
        scale = tl.rsqrt(tl.sum(y * y, axis=1) / head_dim + eps)[:, None]
    if qk_norm == "whole":
        scale *= tl.rsqrt(tl.sum(tl.sum(y * y, axis=1), axis=0) / (heads * head_dim) + eps)
    y *= weighted(scale, weight, head, channel, mask, head_dim, qk_norm)
    if rope_dims > 0:
        rotated = mask & (channel < rope_dims)
        partner = tl.where(channel < half, channel + half, channel - half)
        z = tl.load(x + head * head_dim + partner, mask=rotated, other=0.0).to(tl.float32)
        z *= weighted(scale, weight, head, partner, rotated, head_dim, qk_norm)
        frequency = tl.load(frequencies + channel % half, mask=channel < rope_dims, other=0.0)
        angle = position.to(tl.float32) * frequency
        sin = tl.where(channel < half, -tl.sin(angle), tl.sin(angle))
        y = y * tl.cos(angle) + z * sin
    return y


@triton.jit
def weighted(scale, weight, head, channel, mask, head_dim: tl.constexpr, qk_norm: tl.constexpr):
    """What the norm multiplies these channels by."""
    if qk_norm == "head":
        scale = scale * tl.load(weight + channel, mask=channel < head_dim, other=0.0).to(tl.float32)
    if qk_norm == "whole":
        scale = scale * tl.load(weight + head * head_dim + channel, mask=mask, other=0.0).to(tl.float32)
    return scale


@triton.jit
def attend_blocks(
    q,  # [rows, block_d]
    o,  # float32 [rows, block_d]: the sum of values so far
    top,  # float32 [rows]: the largest score so far
    total,  # float32 [rows]: the sum of the values' weights so far
    keys,  # of a key head: [pages, ..., page_tokens, head_dim], pages `page_stride` apart
    values,
    pages,  # the slot's row of the table
    last_column,
    first,
    end,
    last_seen,  # int32 [rows]: the position of the last token that each row sees
    count,  # how many tokens there are, of which a row may see less
    scale,
    page_stride,
    page_tokens: tl.constexpr,
    block: tl.constexpr,
    head_dim: tl.constexpr,
    block_d: tl.constexpr,
):
    """(o, top, total) after the blocks `first` to `end`. Of the first one each row must see a token."""
    per_page: tl.constexpr = page_tokens // block
    token = tl.arange(0, block)
    channel = tl.arange(0, block_d)
    tile = token[:, None] * head_dim + channel[None, :]
    there = (channel < head_dim)[None, :]
    page = tl.load(pages + tl.minimum(first // per_page, last_column))
    for i in range(first, end):
        at = page.to(tl.int64) * page_stride + (i % per_page) * (block * head_dim)
        page = tl.load(pages + tl.minimum((i + 1) // per_page, last_column))
        # Behind the last token lies what earlier requests have left there, NaN perhaps, which no weight of 0 mends.
        mask = there & (i * block + token < count)[:, None]
        k = tl.load(keys + at + tile, mask=mask, other=0.0)
        zeros = tl.zeros([q.shape[0], block], tl.float32)
        scores = dot(q, tl.trans(k.to(q.dtype)), zeros) * scale
        scores = tl.where((i * block + token)[None, :] <= last_seen[:, None], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(top - higher)
        top = higher
        total = total * fade + tl.sum(weights, axis=1)
        v = tl.load(values + at + tile, mask=mask, other=0.0)
        o = dot(weights.to(q.dtype), v.to(q.dtype), o * fade[:, None])
    return o, top, total


@triton.jit(do_not_specialize=["width"])
def attend_packed(
    q,  # [tokens, num_heads, head_dim]; o is written over it
    projected,  # [tokens, ...], rows in which the gate, like q, begins at `gate_column`
    keys,  # [pages, num_kv_heads, page_tokens, head_dim]
    values,
    table,  # [slots, width]
    lengths,  # [slots]
    slots,  # [sequences]
    offsets,  # [sequences + 1]
    chunks,  # [n, 2]: sequence, chunk of it
    row_stride,
    gate_column,
    width,
    scale,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    gated: tl.constexpr,
    page_tokens: tl.constexpr,
    chunk: tl.constexpr,
    queries: tl.constexpr,
    heads: tl.constexpr,
    block: tl.constexpr,
    block_d: tl.constexpr,
):
    """`queries` tokens of a chunk and `heads` query heads, which read the same key head, to a program."""
    rows: tl.constexpr = queries * heads
    # Later tokens have more to read, and begin first.
    piece = tl.num_programs(1) - 1 - tl.program_id(1)
    at = piece // (chunk // queries)
    sequence = tl.load(chunks + 2 * at)
    first = tl.load(chunks + 2 * at + 1).to(tl.int32) * chunk + piece % (chunk // queries) * queries
    begin = tl.load(offsets + sequence)
    tokens = (tl.load(offsets + sequence + 1) - begin).to(tl.int32)
    if first >= tokens:
        return
    slot = tl.load(slots + sequence)
    past = tl.load(lengths + slot)
    index = tl.arange(0, rows) % queries
    head = tl.program_id(0) * heads + tl.arange(0, rows) // queries
    channel = tl.arange(0, block_d)
    mask = (first + index < tokens)[:, None] & (channel < head_dim)[None, :]
    place = (head * head_dim)[:, None] + channel[None, :]
    q += (begin + first) * (num_heads * head_dim)
    q_place = (index * (num_heads * head_dim))[:, None] + place
    of_head = tl.program_id(0) * heads // (num_heads // num_kv_heads) * (page_tokens * head_dim)
    count = past + tl.minimum(first + queries, tokens)
    o, _top, total = attend_blocks(
        tl.load(q + q_place, mask=mask, other=0.0),
        tl.zeros([rows, block_d], tl.float32),
        tl.full([rows], float("-inf"), tl.float32),
        tl.zeros([rows], tl.float32),
        keys + of_head,
        values + of_head,
        table + slot * width,
        width - 1,
        0,
        tl.cdiv(count, block),
        past + first + index,
        count,
        scale,
        num_kv_heads * page_tokens * head_dim,
        page_tokens,
        block,
        head_dim,
        block_d,
    )
    o /= total[:, None]
    if gated:
        gate = projected + (begin + first) * row_stride + gate_column
        gate_place = (index * row_stride)[:, None] + place
        o *= tl.sigmoid(tl.load(gate + gate_place, mask=mask, other=0.0).to(tl.float32))
    tl.store(q + q_place, o.to(q.dtype.element_ty), mask=mask)
