"""Triton kernels of softmax attention over pages for a decode step, whose tables, lengths and blocks are those of
`modeling.runtime.gpu.kernels.attention`.

The tokens of a row may be split among programs. How many splits it has, and where they begin, depends on its own length
and on what is fixed for a batch of that size, never on the lengths of other rows.
"""

import triton
import triton.language as tl

from modeling.runtime.gpu.kernels.attention import attend_blocks


@triton.jit(do_not_specialize=["width", "batch", "splits", "most_splits", "others"])
def attend_step(
    q,  # [B, num_heads, head_dim]; o of a row that is in one split is written over it
    projected,  # [B, ...], rows in which the gate, like q, begins at `gate_column`
    keys,  # [pages, num_kv_heads, page_tokens, head_dim]
    values,
    table,  # [slots, width]
    lengths,  # [slots]
    slots,  # [B]
    parts,  # float32 [B, num_heads, most_splits, head_dim], o of each split of the rows that have several; or None
    sizes,  # float32 [B, num_heads, most_splits], the logarithm of the sum that o was divided by; or None
    row_stride,
    gate_column,
    width,
    batch,
    splits,
    most_splits,
    others,
    scale,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    gated: tl.constexpr,
    divided: tl.constexpr,
    ragged: tl.constexpr,
    page_tokens: tl.constexpr,
    block: tl.constexpr,
    whole: tl.constexpr,
    piece: tl.constexpr,
    rows: tl.constexpr,
    block_d: tl.constexpr,
):
    """A key head of a request, with the query heads that read it, and a split of the tokens to a program.

    Each row has programs for `splits` splits, one unless `divided`. With `ragged`, which is for pools that can hold
    requests so long that they are in more (`share_of`), `others` programs of each key head, the last ones, take the
    splits behind those, of whatever rows have them."""
    kv_head = tl.program_id(0)
    number = tl.program_id(1)
    if ragged and number >= batch * splits:
        number -= batch * splits
        row, split = further_split(number, slots, lengths, batch, splits, most_splits, block, whole, piece)
        while row < batch:
            attend_split(
                q, projected, keys, values, table, lengths, slots, parts, sizes, row_stride, gate_column, width, splits,
                most_splits, scale, row, kv_head, split, num_heads, num_kv_heads, head_dim, gated, True, False,
                page_tokens, block, whole, piece, rows, block_d,
            )  # fmt: skip
            number += others
            row, split = further_split(
                number, slots, lengths, batch, splits, most_splits, block, whole, piece
            )
        return
    row, split = number, 0
    if divided:
        row, split = number % batch, number // batch
    attend_split(
        q, projected, keys, values, table, lengths, slots, parts, sizes, row_stride, gate_column, width, splits,
        most_splits, scale, row, kv_head, split, num_heads, num_kv_heads, head_dim, gated, divided or ragged,
        not divided, page_tokens, block, whole, piece, rows, block_d,
    )  # fmt: skip


@triton.jit
def attend_split(
    q,
    projected,
    keys,
    values,
    table,
    lengths,
    slots,
    parts,
    sizes,
    row_stride,
    gate_column,
    width,
    splits,
    most_splits,
    scale,
    row,
    kv_head,
    split,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    gated: tl.constexpr,
    several: tl.constexpr,
    leading: tl.constexpr,
    page_tokens: tl.constexpr,
    block: tl.constexpr,
    whole: tl.constexpr,
    piece: tl.constexpr,
    rows: tl.constexpr,
    block_d: tl.constexpr,
):
    """One split of a row. `several`: there may be more; `leading`: it is the first one. Others may have no tokens."""
    groups: tl.constexpr = num_heads // num_kv_heads
    row = row.to(tl.int64)
    slot = tl.load(slots + row)
    count = tl.load(lengths + slot) + 1
    end = tl.cdiv(count, block)
    first = 0  # of the first split, the number of the first page is on its way before the length is there
    alone, filled = True, True
    if several:
        blocks = end
        share = share_of(blocks, splits, most_splits, whole, piece)
        alone = share >= blocks
        if not leading:
            first = split * share
        end = tl.minimum(first + share, blocks)
        if not leading:
            filled = first < end
    if filled:
        member = tl.arange(0, rows)
        channel = tl.arange(0, block_d)
        mask = (member < groups)[:, None] & (channel < head_dim)[None, :]
        place = member[:, None] * head_dim + channel[None, :]
        head = row * num_heads + kv_head * groups
        own = q + head * head_dim + place
        of_head = kv_head * (page_tokens * head_dim)
        o, top, total = attend_blocks(
            tl.load(own, mask=mask, other=0.0),
            tl.zeros([rows, block_d], tl.float32),
            tl.full([rows], float("-inf"), tl.float32),
            tl.zeros([rows], tl.float32),
            keys + of_head,
            values + of_head,
            table + slot * width,
            width - 1,
            first,
            end,
            tl.full([rows], 0, tl.int32) + (count - 1),
            count,
            scale,
            num_kv_heads * page_tokens * head_dim,
            page_tokens,
            block,
            head_dim,
            block_d,
        )
        o /= total[:, None]
        if alone:
            if gated:
                gate = projected + row * row_stride + gate_column + kv_head * (groups * head_dim) + place
                o *= tl.sigmoid(tl.load(gate, mask=mask, other=0.0).to(tl.float32))
            tl.store(own, o.to(q.dtype.element_ty), mask=mask)
        elif several:
            part = (head + member) * most_splits + split
            tl.store(parts + part[:, None] * head_dim + channel[None, :], o, mask=mask)
            tl.store(sizes + part, top + tl.log2(total), mask=member < groups)


@triton.jit
def share_of(blocks, splits, most_splits, whole: tl.constexpr, piece: tl.constexpr):
    """How many blocks of a row each of its splits has, but for the last ones, which may have less or none: a part of
    `splits`. Where that is more than `whole`, the row is cut into up to `most_splits`, of `piece` blocks at least."""
    share = tl.cdiv(blocks, splits)
    return tl.where(share > whole, tl.maximum(tl.cdiv(blocks, most_splits), piece), share)


@triton.jit
def further_split(
    number,
    slots,
    lengths,
    batch,
    splits,
    most_splits,
    block: tl.constexpr,
    whole: tl.constexpr,
    piece: tl.constexpr,
):
    """(row, split) of that number among the splits behind the first `splits` ones of all rows; the row is `batch` where
    there are not so many."""
    lanes: tl.constexpr = 128
    found, split, before = batch, 0, 0
    for start in range(0, batch, lanes):
        row = start + tl.arange(0, lanes)
        there = row < batch
        slot = tl.load(slots + row, mask=there, other=0)
        blocks = tl.cdiv(tl.load(lengths + slot, mask=there, other=0) + 1, block)
        share = share_of(blocks, splits, most_splits, whole, piece)
        further = tl.where(there, tl.maximum(tl.cdiv(blocks, share) - splits, 0), 0)
        end = before + tl.cumsum(further, axis=0)
        here = (number >= end - further) & (number < end)
        found = tl.minimum(found, tl.min(tl.where(here, row, batch), axis=0))
        split += tl.sum(tl.where(here, number - (end - further) + splits, 0), axis=0)
        before += tl.sum(further, axis=0)
    return found, split


@triton.jit(do_not_specialize=["splits", "most_splits"])
def join_splits(
    out,  # [B, num_heads, head_dim]
    projected,  # [B, ...], rows in which the gate, like out, begins at `gate_column`
    lengths,  # [slots]
    slots,  # [B]
    parts,  # float32 [B, num_heads, most_splits, head_dim]
    sizes,  # float32 [B, num_heads, most_splits]
    row_stride,
    gate_column,
    splits,
    most_splits,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    gated: tl.constexpr,
    block: tl.constexpr,
    whole: tl.constexpr,
    piece: tl.constexpr,
    padded_splits: tl.constexpr,
    columns: tl.constexpr,
):
    """`columns` channels of a head of a request to a program. What is in one split is there already."""
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(tl.load(lengths + tl.load(slots + row)) + 1, block)
    share = share_of(blocks, splits, most_splits, whole, piece)
    if share >= blocks:
        return
    head = row * num_heads + tl.program_id(1)
    split = tl.arange(0, padded_splits)
    filled = split * share < blocks
    channel = tl.program_id(2) * columns + tl.arange(0, columns)
    there = channel < head_dim
    size = tl.load(sizes + head * most_splits + split, mask=filled, other=float("-inf"))
    part = parts + (head * most_splits + split)[:, None] * head_dim + channel[None, :]
    o = tl.load(part, mask=filled[:, None] & there[None, :], other=0.0)
    weight = tl.exp2(size - tl.max(size, axis=0))
    y = tl.sum(o * weight[:, None], axis=0) / tl.sum(weight, axis=0)
    place = tl.program_id(1) * head_dim + channel
    if gated:
        gate = tl.load(projected + row * row_stride + gate_column + place, mask=there, other=0.0)
        y *= tl.sigmoid(gate.to(tl.float32))
    tl.store(out + row * (num_heads * head_dim) + place, y.to(out.dtype.element_ty), mask=there)
