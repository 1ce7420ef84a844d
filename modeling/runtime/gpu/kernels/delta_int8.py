"""Triton kernels of a decode step with states in 8 bits; `modeling.runtime.gpu.delta_int8` launches them.

With a byte for each element a step is no longer bound by memory alone: `mixer_step`, which does everything in one
program for each head, spends more time on the convolution and on exchanges between its threads than on the state. So
the state is moved on by a kernel that does nothing else.

It reads and writes words of four neighbouring columns. With a word to a thread, a warp reads whole rows of up to 128
columns, and all of a thread's elements are of the same four: sums over rows stay within threads, but for one exchange
between warps. Read as bytes, sixteen columns would go to each thread.
"""

import triton
import triton.language as tl

from modeling.runtime.gpu.kernels.delta import convolve, load_inputs, log_decay_of, move_history_on
from modeling.runtime.gpu.kernels.rounding import rounded, scales_of


@triton.jit
def convolve_step(
    projected,  # [B, at least channels], rows that begin with `q | k | v`
    conv,  # [slots, channels, taps - 1]
    slots,  # [B]
    qkv,  # [B, channels], float32
    weight,  # [channels, taps]
    bias,
    row_stride,
    d_k,
    scale,
    l2_eps,
    num_k_heads: tl.constexpr,
    num_v_heads: tl.constexpr,
    d_v: tl.constexpr,
    taps: tl.constexpr,
    block: tl.constexpr,
    columns: tl.constexpr,
):
    """A head of q (normalised and scaled), k (normalised) or v of one request to a program."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    channels = 2 * num_k_heads * d_k + num_v_heads * d_v
    is_v = part >= 2 * num_k_heads
    v_at = 2 * num_k_heads * d_k + (part - 2 * num_k_heads) * d_v
    index = tl.arange(0, block)
    channel = (tl.where(is_v, v_at, part * d_k) + index)[:, None, None]
    mask = (index < tl.where(is_v, d_v, d_k))[:, None, None]
    history = conv + tl.load(slots + row).to(tl.int64) * channels * (taps - 1)
    old, new, filters = load_inputs(
        projected + row * row_stride, history, weight, channel, mask, taps, columns
    )
    y, window = convolve(old, new, filters, bias, channel, mask, taps, columns)
    y = tl.sum(y, axis=1)
    tl.debug_barrier()
    move_history_on(window, history, channel, mask, taps, columns)
    norm = tl.rsqrt(tl.sum(tl.where(index < d_k, y * y, 0.0), axis=0) + l2_eps)
    y *= tl.where(is_v, 1.0, tl.where(part < num_k_heads, norm * scale, norm))
    target = tl.where(is_v, v_at, part * d_k) + index
    tl.store(qkv + row * channels + target, y, mask=index < tl.where(is_v, d_v, d_k))


@triton.jit
def _byte(word, place: tl.constexpr):
    """One of the four codes in each word."""
    return ((word << (24 - 8 * place)) >> 24).to(tl.float32)


@triton.jit
def _add(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _larger(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit(do_not_specialize_on_alignment=["words"])  # else four words would go to each thread
def move_states_on(
    qkv,  # [B, channels]: what `convolve_step` makes
    projected,  # [B, ...], rows in which `beta | decay` begins at `gates_at`
    words,  # [slots, num_v_heads, d_k, d_v / 4]: the states as int32
    scales,  # [slots, num_v_heads, d_v]
    slots,  # [B]
    o,  # [B, num_v_heads, d_v], float32
    a_log,
    dt_bias,
    row_stride,
    gates_at,
    beta_scale,
    num_v_heads: tl.constexpr,
    groups: tl.constexpr,
    d_k: tl.constexpr,
    d_v: tl.constexpr,
    has_decay: tl.constexpr,
    has_beta: tl.constexpr,
    block_k: tl.constexpr,
    block_w: tl.constexpr,
):
    """`block_w` words of columns of a head's state to a program."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = tl.arange(0, block_k), tl.program_id(2) * block_w + tl.arange(0, block_w)
    i_mask, j_mask = i < d_k, j < d_v // 4
    state = tl.load(slots + row).to(tl.int64) * num_v_heads + head
    tile = words + state * d_k * (d_v // 4) + i[:, None] * (d_v // 4) + j[None, :]
    mask = i_mask[:, None] & j_mask[None, :]
    word = tl.load(tile, mask=mask, other=0)
    units = scales + state * d_v + 4 * j
    d0, d1 = tl.load(units, mask=j_mask, other=0.0), tl.load(units + 1, mask=j_mask, other=0.0)
    d2, d3 = tl.load(units + 2, mask=j_mask, other=0.0), tl.load(units + 3, mask=j_mask, other=0.0)

    key_dim = num_v_heads // groups * d_k
    qkv += row * (2 * key_dim + num_v_heads * d_v)
    keys = head // groups * d_k + i
    q, k = tl.load(qkv + keys, mask=i_mask, other=0.0), tl.load(qkv + key_dim + keys, mask=i_mask, other=0.0)
    values = qkv + 2 * key_dim + head * d_v + 4 * j
    v0, v1 = tl.load(values, mask=j_mask, other=0.0), tl.load(values + 1, mask=j_mask, other=0.0)
    v2, v3 = tl.load(values + 2, mask=j_mask, other=0.0), tl.load(values + 3, mask=j_mask, other=0.0)
    gate = projected + row * row_stride + gates_at + head
    beta = beta_scale
    if has_beta:
        beta = tl.sigmoid(tl.load(gate).to(tl.float32)) * beta_scale
        gate += num_v_heads
    if has_decay:
        decay = tl.exp(log_decay_of(tl.load(gate), tl.load(dt_bias + head), tl.load(a_log + head)))
        d0, d1, d2, d3 = d0 * decay, d1 * decay, d2 * decay, d3 * decay
    qk = tl.sum(q * k, axis=0)
    q, k = q[:, None], k[:, None]

    s0, s1, s2, s3 = _byte(word, 0), _byte(word, 1), _byte(word, 2), _byte(word, 3)
    # All sums over rows at once, so that warps exchange theirs once.
    k0, k1, k2, k3, q0, q1, q2, q3 = tl.reduce(
        (s0 * k, s1 * k, s2 * k, s3 * k, s0 * q, s1 * q, s2 * q, s3 * q), 0, _add
    )
    u0, u1, u2, u3 = v0 - d0 * k0, v1 - d1 * k1, v2 - d2 * k2, v3 - d3 * k3
    u0, u1, u2, u3 = beta * u0, beta * u1, beta * u2, beta * u3
    read = o + (row * num_v_heads + head) * d_v + 4 * j
    tl.store(read, d0 * q0 + u0 * qk, mask=j_mask)
    tl.store(read + 1, d1 * q1 + u1 * qk, mask=j_mask)
    tl.store(read + 2, d2 * q2 + u2 * qk, mask=j_mask)
    tl.store(read + 3, d3 * q3 + u3 * qk, mask=j_mask)

    s0, s1 = s0 * d0[None, :] + k * u0[None, :], s1 * d1[None, :] + k * u1[None, :]
    s2, s3 = s2 * d2[None, :] + k * u2[None, :], s3 * d3[None, :] + k * u3[None, :]
    m0, m1, m2, m3 = tl.reduce((tl.abs(s0), tl.abs(s1), tl.abs(s2), tl.abs(s3)), 0, _larger)
    d0, i0 = scales_of(m0, u0)
    d1, i1 = scales_of(m1, u1)
    d2, i2 = scales_of(m2, u2)
    d3, i3 = scales_of(m3, u3)
    low = (rounded(s0, i0) & 255) | ((rounded(s1, i1) & 255) << 8)
    high = ((rounded(s2, i2) & 255) << 16) | (rounded(s3, i3) << 24)
    tl.store(tile, low | high, mask=mask)
    tl.store(units, d0, mask=j_mask)
    tl.store(units + 1, d1, mask=j_mask)
    tl.store(units + 2, d2, mask=j_mask)
    tl.store(units + 3, d3, mask=j_mask)
