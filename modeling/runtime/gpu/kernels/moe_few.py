"""Triton kernels of the mixture of experts where tokens are few, each pair a product of a vector;
`modeling.runtime.gpu.moe` launches them, and `kernels.moe` says what pairs are.

A program multiplies and adds in registers, element by element, and sums over columns once, at its end. So the norm can
come behind the product: its factor is known when all of the row has been read.
"""

import triton
import triton.language as tl

from modeling.runtime.gpu.kernels.moe import choices_of, columns


@triton.jit
def few_scores(
    x,  # [rows, hidden]
    norm,  # [hidden], or None
    router,  # [experts, hidden]
    logits,  # [rows, experts]
    eps,
    hidden: tl.constexpr,
    experts: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """The scores of `block_n` experts for one token. A row fits into a program."""
    token = tl.program_id(1).to(tl.int64)
    expert = tl.program_id(0) * block_n + tl.arange(0, block_n)
    weights = columns(router, tl.minimum(expert, experts - 1), 0, hidden, hidden, block_k).to(tl.float32)
    k = tl.arange(0, block_k)
    a = tl.load(x + token * hidden + k, mask=k < hidden, other=0.0).to(tl.float32)
    if norm is not None:
        factor = tl.rsqrt(tl.sum(a * a, axis=0) / hidden + eps)
        a *= factor * tl.load(norm + k, mask=k < hidden, other=0.0).to(tl.float32)
        # Rounded as where tokens are more: else those would take other experts where two are close.
        a = a.to(x.dtype.element_ty).to(tl.float32)
    score = tl.sum(a[None, :] * weights, axis=1).to(logits.dtype.element_ty)
    tl.store(logits + token * experts + expert, score, mask=expert < experts)


@triton.jit
def _row_in(
    x,  # [hidden], of the pair's token
    z,  # [size], of the pair
    matrix,  # [2 * size, hidden], rows `gate | up`
    norm,
    gate,
    eps,
    first_column,
    hidden: tl.constexpr,
    size: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    stages: tl.constexpr,
):
    """What `few_in` stores in z for one pair. Returns the product of the normed x and `gate`, 0 where that is None."""
    column = first_column + tl.arange(0, block_n)
    row = tl.minimum(column, size - 1)
    of_gate = tl.zeros([block_n, block_k], tl.float32)
    of_up = tl.zeros([block_n, block_k], tl.float32)
    of_all = tl.zeros([block_k], tl.float32)
    squares = tl.zeros([block_k], tl.float32)
    for start in tl.range(0, hidden, block_k, num_stages=stages):
        k = start + tl.arange(0, block_k)
        a = tl.load(x + k, mask=k < hidden, other=0.0).to(tl.float32)
        if norm is not None:
            squares += a * a
            a *= tl.load(norm + k, mask=k < hidden, other=0.0).to(tl.float32)
        if gate is not None:
            of_all += a * tl.load(gate + k, mask=k < hidden, other=0.0).to(tl.float32)
        of_gate += a[None, :] * columns(matrix, row, start, hidden, hidden, block_k).to(tl.float32)
        of_up += a[None, :] * columns(matrix, row + size, start, hidden, hidden, block_k).to(tl.float32)
    factor = 1.0
    if norm is not None:
        factor = tl.rsqrt(tl.sum(squares, axis=0) / hidden + eps)
    g = tl.sum(of_gate, axis=1) * factor
    value = g * tl.sigmoid(g) * (tl.sum(of_up, axis=1) * factor)
    tl.store(z + column, value.to(z.dtype.element_ty), mask=column < size)
    return tl.sum(of_all, axis=0) * factor


@triton.jit
def few_in(
    logits,  # [rows, experts]
    x,  # [rows, hidden]
    norm,  # [hidden], or None
    gate,  # [hidden]
    z,  # [rows * (top_k + 1), z_size]
    in_proj,  # [experts, 2 * size, hidden], rows `gate | up`
    shared_in,  # [2 * shared_size, hidden], likewise
    chosen,  # [rows, top_k], int32
    weights,  # [rows, top_k + 1], float32
    eps,
    hidden: tl.constexpr,
    size: tl.constexpr,
    shared_size: tl.constexpr,
    z_size: tl.constexpr,
    top_k: tl.constexpr,
    experts: tl.constexpr,
    block_e: tl.constexpr,
    block_j: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    stages: tl.constexpr,
):
    """silu(gate) * up of one pair, `block_n` columns. Each program finds out by itself which expert that is, and the
    first of a pair keeps it, and its weight, for `few_out`."""
    pair = tl.program_id(0).to(tl.int64)
    first_column = tl.program_id(1) * block_n
    token, choice = pair // (top_k + 1), pair % (top_k + 1)
    x += token * hidden
    z += pair * z_size
    if choice == top_k:
        score = _row_in(
            x, z, shared_in, norm, gate, eps, first_column, hidden, shared_size, block_n, block_k, stages
        )
        weight = tl.sigmoid(score)
    else:
        of_token, of_weight = choices_of(logits + token * experts, experts, top_k, block_e, block_j)
        is_it = tl.arange(0, block_j) == choice
        expert = tl.sum(tl.where(is_it, of_token, 0), axis=0)
        weight = tl.sum(tl.where(is_it, of_weight, 0.0), axis=0)
        matrix = in_proj + expert.to(tl.int64) * (2 * size * hidden)
        _row_in(x, z, matrix, norm, None, eps, first_column, hidden, size, block_n, block_k, stages)
        tl.store(chosen + token * top_k + choice, expert, mask=first_column == 0)
    tl.store(weights + pair, weight, mask=first_column == 0)


@triton.jit
def _row_out(acc, z, weight, matrix, row, size: tl.constexpr, block_k: tl.constexpr):
    """`acc` `[rows, block_k]` plus what, summed over columns, is the product of one pair by its weight."""
    for start in tl.static_range(0, size, block_k):
        k = start + tl.arange(0, block_k)
        a = tl.load(z + k, mask=k < size, other=0.0).to(tl.float32) * weight
        acc += a[None, :] * columns(matrix, row, start, size, size, block_k).to(tl.float32)
    return acc


@triton.jit
def few_out(
    z,  # [rows * (top_k + 1), z_size]
    out_proj,  # [experts, hidden, size]
    shared_out,  # [hidden, shared_size]
    chosen,  # [rows, top_k]
    weights,  # [rows, top_k + 1]
    residual,  # [rows, hidden], or None
    out,  # [rows, hidden], which may be `residual`
    hidden: tl.constexpr,
    size: tl.constexpr,
    shared_size: tl.constexpr,
    z_size: tl.constexpr,
    top_k: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
):
    """The second products and the sum of all pairs of a token, `block_n` columns."""
    token = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    row = tl.minimum(column, hidden - 1)
    pair = token * (top_k + 1)
    acc = tl.zeros([block_n, block_k], tl.float32)
    for j in tl.static_range(top_k):
        expert = tl.load(chosen + token * top_k + j).to(tl.int64)
        matrix = out_proj + expert * (hidden * size)
        acc = _row_out(acc, z + (pair + j) * z_size, tl.load(weights + pair + j), matrix, row, size, block_k)
    weight = tl.load(weights + pair + top_k)
    acc = _row_out(acc, z + (pair + top_k) * z_size, weight, shared_out, row, shared_size, block_k)
    y = tl.sum(acc, axis=1)
    if residual is not None:
        y += tl.load(residual + token * hidden + column, mask=column < hidden, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + column, y.to(out.dtype.element_ty), mask=column < hidden)
