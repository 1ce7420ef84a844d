"""Triton kernels of the mixture of experts; `modeling.runtime.gpu.moe` launches them and says what they compute.

A pair is a token and one of the experts that it takes. The expert that all tokens take counts as the last of each
token's `top_k + 1` pairs, so that its products need no launches of their own. Pair `p` belongs to token
`p // (top_k + 1)`.

All products accumulate in float32, and a row of a product depends on no other row: what a block holds beyond its pairs
is computed from rows that exist, and not stored.
"""

import triton
import triton.language as tl

from modeling.runtime.gpu.kernels.dots import dot

LEAST = tl.constexpr(-(2**63))
"""Less than the key of any expert."""


@triton.jit
def _ordered(bits):
    """Between the bits of a float32 and an int32 that compares as the number does. It is its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def choices_of(
    logits,  # [experts], of one token
    experts: tl.constexpr,
    top_k: tl.constexpr,
    block_e: tl.constexpr,
    block_j: tl.constexpr,
):
    """The experts that a token takes, int32, and their weights, float32; `block_j` of each, of which `top_k` count.

    Of equal experts the first are taken; a score that is NaN makes all weights NaN.
    """
    e = tl.arange(0, block_e)
    score = tl.load(logits + e, mask=e < experts, other=float("-inf")).to(tl.float32)
    largest = tl.max(score, axis=0)
    total = tl.sum(tl.exp(score - largest), axis=0)  # NaN if a score is
    key = _ordered(score.to(tl.int32, bitcast=True)).to(tl.int64) << 32
    key = tl.where(e < experts, key | (block_e - 1 - e).to(tl.int64), LEAST)
    j = tl.arange(0, block_j)
    chosen = tl.zeros([block_j], tl.int32)
    weight = tl.zeros([block_j], tl.float32)
    for choice in tl.static_range(top_k):
        best = tl.max(key, axis=0)
        key = tl.where(key == best, LEAST, key)
        its_score = _ordered((best >> 32).to(tl.int32)).to(tl.float32, bitcast=True)
        chosen = tl.where(j == choice, block_e - 1 - (best & 0x7FFFFFFF).to(tl.int32), chosen)
        weight = tl.where(j == choice, tl.exp(its_score - largest) / total, weight)
    return chosen, weight / tl.sum(weight, axis=0)


@triton.jit(do_not_specialize=["rows"])
def route(
    logits,  # [rows, experts]
    x,  # [rows, hidden]
    gate,  # [hidden]
    weights,  # [rows, top_k + 1], float32
    counts,  # [experts], int32 zeros
    table,  # [experts, rows], int32
    rows,
    hidden: tl.constexpr,
    experts: tl.constexpr,
    top_k: tl.constexpr,
    block_h: tl.constexpr,
    block_e: tl.constexpr,
    block_j: tl.constexpr,
):
    """One token: the weights of its experts and of the one that all take, and its places in the lists of the
    tokens that each expert gets.

    Programs take places in the lists in whatever order they run, on which nothing depends but the order of rows within
    blocks.
    """
    token = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, block_h)
    y = tl.load(x + token * hidden + h, mask=h < hidden, other=0.0)
    of_gate = tl.load(gate + h, mask=h < hidden, other=0.0).to(tl.float32)
    of_shared = tl.sigmoid(tl.sum(y.to(tl.float32) * of_gate, axis=0))

    chosen, weight = choices_of(logits + token * experts, experts, top_k, block_e, block_j)
    j = tl.arange(0, block_j)
    first = token * (top_k + 1)
    tl.store(weights + first + j, weight, mask=j < top_k)
    tl.store(weights + first + top_k, of_shared)
    place = tl.atomic_add(counts + chosen, 1, mask=j < top_k, sem="relaxed")
    tl.store(table + chosen.to(tl.int64) * rows + place, (first + j).to(tl.int32), mask=j < top_k)


@triton.jit
def columns(matrix, row, start, stride: tl.constexpr, size: tl.constexpr, block_k: tl.constexpr):
    """Columns from `start` on of rows of a matrix whose rows lie `stride` apart, as `[rows, block_k]`; zeros beyond
    column `size`."""
    k = start + tl.arange(0, block_k)
    source = matrix + row[:, None] * stride + k[None, :]
    if size % block_k == 0:
        tile = tl.load(source)
    else:
        tile = tl.load(source, mask=(k < size)[None, :], other=0.0)
    return tile


@triton.jit
def _columns_t(matrix, row, start, size: tl.constexpr, block_k: tl.constexpr):
    """`columns` of a matrix `[..., size]`, transposed: `[block_k, rows]`."""
    k = start + tl.arange(0, block_k)
    source = matrix + row[None, :] * size + k[:, None]
    if size % block_k == 0:
        tile = tl.load(source)
    else:
        tile = tl.load(source, mask=(k < size)[:, None], other=0.0)
    return tile


@triton.jit
def _pairs_of(
    block,
    counts,
    table,
    rows,
    top_k: tl.constexpr,
    experts: tl.constexpr,
    block_e: tl.constexpr,
    block_m: tl.constexpr,
):
    """The expert that a block is of, its pairs, and which of them are to be stored.

    The blocks of the expert that all tokens take come first; its number is -1. Each other has as many blocks as its
    list takes. A block behind the last of all is of no expert: the number returned is `experts` or more then.
    """
    i = tl.arange(0, block_m)
    shared_blocks = tl.cdiv(rows, block_m)
    is_shared = block < shared_blocks
    token = block * block_m + i
    e = tl.arange(0, block_e)
    ends = tl.cumsum(tl.cdiv(tl.load(counts + e, mask=e < experts, other=0), block_m), axis=0)
    block = tl.maximum(block - shared_blocks, 0)
    before = ends <= block
    expert = tl.sum(before.to(tl.int32), axis=0)
    count = tl.load(counts + expert, mask=expert < experts, other=0)
    place = (block - tl.max(tl.where(before, ends, 0), axis=0)) * block_m + i
    at = table + expert.to(tl.int64) * rows + tl.minimum(place, tl.maximum(count - 1, 0))
    listed = tl.load(at, mask=expert < experts, other=0)
    # By choices instead of an `if`: Triton's compiler fails with some tiles if these come out of one.
    pair = tl.where(is_shared, tl.minimum(token, rows - 1) * (top_k + 1) + top_k, listed).to(tl.int64)
    mask = tl.where(is_shared, token < rows, place < count)
    expert = tl.where(is_shared, -1, expert)
    return expert, pair, mask


@triton.jit
def _block_in(
    x,
    z,
    matrix,  # [2 * size, hidden], rows `gate | up`
    pair,
    mask,
    first_column,
    hidden: tl.constexpr,
    size: tl.constexpr,
    z_size: tl.constexpr,
    top_k: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """What `experts_in` computes, for pairs of one expert."""
    column = first_column + tl.arange(0, block_n)
    row = tl.minimum(column, size - 1)
    token = pair // (top_k + 1)
    gate = tl.zeros([block_m, block_n], tl.float32)
    up = tl.zeros([block_m, block_n], tl.float32)
    for start in range(0, hidden, block_k):
        a = columns(x, token, start, hidden, hidden, block_k)
        b = _columns_t(matrix, row, start, hidden, block_k).to(a.dtype)
        c = _columns_t(matrix, row + size, start, hidden, block_k).to(a.dtype)
        gate = dot(a, b, gate)
        up = dot(a, c, up)
    value = (gate * tl.sigmoid(gate) * up).to(z.dtype.element_ty)
    target = z + pair[:, None] * z_size + column[None, :]
    tl.store(target, value, mask=mask[:, None] & (column < size)[None, :])


@triton.jit(do_not_specialize=["rows"])
def experts_in(
    x,  # [rows, hidden]
    z,  # [rows * (top_k + 1), z_size]
    in_proj,  # [experts, 2 * size, hidden], rows `gate | up`
    shared_in,  # [2 * shared_size, hidden], likewise
    counts,  # [experts]
    table,  # [experts, rows]
    rows,
    hidden: tl.constexpr,
    size: tl.constexpr,
    shared_size: tl.constexpr,
    z_size: tl.constexpr,
    top_k: tl.constexpr,
    experts: tl.constexpr,
    block_e: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """silu(gate) * up of `block_m` pairs of one expert, `block_n` columns."""
    expert, pair, mask = _pairs_of(tl.program_id(0), counts, table, rows, top_k, experts, block_e, block_m)
    first_column = tl.program_id(1) * block_n
    if expert < 0:
        _block_in(
            x, z, shared_in, pair, mask, first_column,
            hidden, shared_size, z_size, top_k, block_m, block_n, block_k,
        )  # fmt: skip
    elif expert < experts:
        _block_in(
            x, z, in_proj + expert.to(tl.int64) * (2 * size * hidden), pair, mask, first_column,
            hidden, size, z_size, top_k, block_m, block_n, block_k,
        )  # fmt: skip


@triton.jit
def _block_out(
    z,
    y,
    matrix,  # [hidden, size]
    pair,
    mask,
    first_column,
    hidden: tl.constexpr,
    size: tl.constexpr,
    z_size: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """What `experts_out` computes, for pairs of one expert."""
    column = first_column + tl.arange(0, block_n)
    row = tl.minimum(column, hidden - 1)
    out = tl.zeros([block_m, block_n], tl.float32)
    for start in range(0, size, block_k):
        a = columns(z, pair, start, z_size, size, block_k)
        out = dot(a, _columns_t(matrix, row, start, size, block_k).to(a.dtype), out)
    target = y + pair[:, None] * hidden + column[None, :]
    tl.store(target, out.to(y.dtype.element_ty), mask=mask[:, None] & (column < hidden)[None, :])


@triton.jit(do_not_specialize=["rows"])
def experts_out(
    z,  # [rows * (top_k + 1), z_size]
    y,  # [rows * (top_k + 1), hidden]
    out_proj,  # [experts, hidden, size]
    shared_out,  # [hidden, shared_size]
    counts,  # [experts]
    table,  # [experts, rows]
    rows,
    hidden: tl.constexpr,
    size: tl.constexpr,
    shared_size: tl.constexpr,
    z_size: tl.constexpr,
    top_k: tl.constexpr,
    experts: tl.constexpr,
    block_e: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """The second product of `block_m` pairs of one expert, `block_n` columns."""
    expert, pair, mask = _pairs_of(tl.program_id(0), counts, table, rows, top_k, experts, block_e, block_m)
    first_column = tl.program_id(1) * block_n
    if expert < 0:
        _block_out(
            z, y, shared_out, pair, mask, first_column,
            hidden, shared_size, z_size, block_m, block_n, block_k,
        )  # fmt: skip
    elif expert < experts:
        _block_out(
            z, y, out_proj + expert.to(tl.int64) * (hidden * size), pair, mask, first_column,
            hidden, size, z_size, block_m, block_n, block_k,
        )  # fmt: skip


@triton.jit
def combine(
    y,  # [rows * (top_k + 1), hidden]
    weights,  # [rows, top_k + 1]
    residual,  # [rows, hidden], or None
    out,  # [rows, hidden], which may be `residual`
    hidden: tl.constexpr,
    top_k: tl.constexpr,
    block: tl.constexpr,
):
    """`block` columns of a token: the residual, and its pairs by their weights, in the order of the pairs."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    mask = column < hidden
    acc = tl.zeros([block], tl.float32)
    for j in tl.static_range(top_k + 1):
        pair = token * (top_k + 1) + j
        acc += tl.load(y + pair * hidden + column, mask=mask, other=0.0).to(tl.float32) * tl.load(
            weights + pair
        )
    if residual is not None:
        acc += tl.load(residual + token * hidden + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, acc.to(out.dtype.element_ty), mask=mask)
