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

from modeling.runtime.gpu.kernels.delta import _convolve, _inputs, _log_decay, _move_on
from modeling.runtime.gpu.kernels.rounding import LEVELS, ROUNDING, SMALLEST, scales_of

OFFSET = tl.constexpr(128)
"""Added to codes, so that they are from 1 to 255 and sums of shifted ones have no borrows."""
SUM_OF_BITS = tl.constexpr(0x8B400000 - 2**32)
"""What four float32 numbers of exponent 23, shifted by a byte each, sum up to beside their codes."""
SIGNS = tl.constexpr(0x80808080 - 2**32)


@triton.jit
def convolve_step(
    projected,  # [B, at least channels], rows that begin with `q | k | v`
    conv,  # [slots, channels, taps - 1]
    slots,  # [B]
    qk,  # [B, num_k_heads, d_k, 2], float32: k and q side by side
    v,  # [B, num_v_heads, d_v], float32
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
    old, new, filters = _inputs(projected + row * row_stride, history, weight, channel, mask, taps, columns)
    y, window = _convolve(old, new, filters, bias, channel, mask, taps, columns)
    y = tl.sum(y, axis=1)
    tl.debug_barrier()
    _move_on(window, history, channel, mask, taps, columns)
    norm = tl.rsqrt(tl.sum(tl.where(index < d_k, y * y, 0.0), axis=0) + l2_eps)
    y *= tl.where(is_v, 1.0, tl.where(part < num_k_heads, norm * scale, norm))
    is_q = part < num_k_heads
    key_head = tl.where(is_q, part, part - num_k_heads)
    pair = qk + ((row * num_k_heads + key_head) * d_k + index) * 2 + tl.where(is_q, 1, 0)
    value = v + row * num_v_heads * d_v + (part - 2 * num_k_heads) * d_v + index
    tl.store(tl.where(is_v, value, pair), y, mask=index < tl.where(is_v, d_v, d_k))


@triton.jit
def _byte(word, place: tl.constexpr):
    """One of the four codes in each word."""
    return ((word << (24 - 8 * place)) >> 24).to(tl.float32)


@triton.jit
def _halves(pair):
    """The floats in the lower and the upper half of int64."""
    lower, upper = pair.to(tl.int32), (pair >> 32).to(tl.int32)
    return lower.to(tl.float32, bitcast=True), upper.to(tl.float32, bitcast=True)


@triton.jit
def _unit(scale, u):
    """What to count columns in that had this scale, and get u times k: the scale, unless beside u nothing is left of
    what was there."""
    return tl.maximum(tl.maximum(scale, tl.abs(u) * 2.0**-60), 2.0**-120)


@triton.jit
def _scales(largest, unit, broken):
    """Scales of columns whose largest entries are given in units, and what to multiply entries in units by."""
    scale, _ = scales_of(largest * unit, broken)
    inverse = tl.div_rn(tl.zeros_like(largest) + LEVELS, tl.maximum(largest, SMALLEST))
    return scale, tl.where(scale == 0.0, 0.0, inverse)


@triton.jit
def _code(state, inverse):
    """The codes of entries `[rows, columns]` in the last bytes of int32, `OFFSET` added; `inverse` is `[columns]`."""
    units = tl.fma(
        state, tl.broadcast_to(inverse[None, :], state.shape), tl.zeros_like(state) + (ROUNDING + OFFSET)
    )
    return units.to(tl.int32, bitcast=True)


@triton.jit
def _word(first, second, third, fourth):
    """Four of `_code`, as a word of codes."""
    return (((fourth * 256 + third) * 256 + second) * 256 + first - SUM_OF_BITS) ^ SIGNS


@triton.jit
def _add(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _larger(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit(do_not_specialize_on_alignment=["words"])  # else four words would go to each thread
def move_states_on(
    qk,  # [B, num_k_heads, d_k] int64: what `convolve_step` makes, k and q in the two halves of each
    v,  # [B, num_v_heads, d_v]
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
    rows: tl.constexpr,
    block_w: tl.constexpr,
):
    """`block_w` words of columns of a head's state to a program, `rows` rows at a time: as many as its warps hold with
    a word to a thread."""
    width: tl.constexpr = d_v // 4
    steps: tl.constexpr = (d_k + rows - 1) // rows
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = tl.arange(0, rows), tl.program_id(2) * block_w + tl.arange(0, block_w)
    j_mask = j < width
    state = tl.load(slots + row).to(tl.int64) * num_v_heads + head
    tile = words + state * d_k * width + i[:, None] * width + j[None, :]
    held = ()
    for step in tl.static_range(steps):
        mask = (step * rows + i < d_k)[:, None] & j_mask[None, :]
        held += (tl.load(tile + step * rows * width, mask=mask, other=0),)
    units = scales + state * d_v + 4 * j
    d0, d1 = tl.load(units, mask=j_mask, other=0.0), tl.load(units + 1, mask=j_mask, other=0.0)
    d2, d3 = tl.load(units + 2, mask=j_mask, other=0.0), tl.load(units + 3, mask=j_mask, other=0.0)
    value = (row * num_v_heads + head) * d_v + 4 * j
    v0, v1 = tl.load(v + value, mask=j_mask, other=0.0), tl.load(v + value + 1, mask=j_mask, other=0.0)
    v2, v3 = tl.load(v + value + 2, mask=j_mask, other=0.0), tl.load(v + value + 3, mask=j_mask, other=0.0)
    gate = projected + row * row_stride + gates_at + head
    beta = beta_scale
    if has_beta:
        beta = tl.sigmoid(tl.load(gate).to(tl.float32)) * beta_scale
        gate += num_v_heads
    if has_decay:
        decay = tl.exp(_log_decay(tl.load(gate), tl.load(dt_bias + head), tl.load(a_log + head)))
        d0, d1, d2, d3 = d0 * decay, d1 * decay, d2 * decay, d3 * decay

    # S^T k and S^T q in units of the scales, and k q.
    pairs = qk + (row * (num_v_heads // groups) + head // groups) * d_k + i
    kq = tl.zeros([rows], tl.float32)
    k0, k1 = tl.zeros([rows, block_w], tl.float32), tl.zeros([rows, block_w], tl.float32)
    k2, k3, q0, q1, q2, q3 = k0, k0, k0, k0, k0, k0
    for step in tl.static_range(steps):
        pair = tl.load(pairs + step * rows, mask=step * rows + i < d_k, other=0)
        k, q = _halves(pair)
        kq += k * q
        k, q = k[:, None], q[:, None]
        s0, s1, s2, s3 = (
            _byte(held[step], 0),
            _byte(held[step], 1),
            _byte(held[step], 2),
            _byte(held[step], 3),
        )
        k0, k1, k2, k3 = k0 + s0 * k, k1 + s1 * k, k2 + s2 * k, k3 + s3 * k
        q0, q1, q2, q3 = q0 + s0 * q, q1 + s1 * q, q2 + s2 * q, q3 + s3 * q
    kq = tl.sum(kq, axis=0)
    k0, k1, k2, k3, q0, q1, q2, q3 = tl.reduce((k0, k1, k2, k3, q0, q1, q2, q3), 0, _add)
    u0, u1, u2, u3 = v0 - d0 * k0, v1 - d1 * k1, v2 - d2 * k2, v3 - d3 * k3
    u0, u1, u2, u3 = beta * u0, beta * u1, beta * u2, beta * u3
    tl.store(o + value, d0 * q0 + u0 * kq, mask=j_mask)
    tl.store(o + value + 1, d1 * q1 + u1 * kq, mask=j_mask)
    tl.store(o + value + 2, d2 * q2 + u2 * kq, mask=j_mask)
    tl.store(o + value + 3, d3 * q3 + u3 * kq, mask=j_mask)

    # The new state in the same units, which takes one operation for each element.
    d0, d1, d2, d3 = _unit(d0, u0), _unit(d1, u1), _unit(d2, u2), _unit(d3, u3)
    w0, w1, w2, w3 = (u0 / d0)[None, :], (u1 / d1)[None, :], (u2 / d2)[None, :], (u3 / d3)[None, :]
    m0 = tl.zeros([rows, block_w], tl.float32)
    m1, m2, m3 = m0, m0, m0
    moved = ()
    for step in tl.static_range(steps):
        k, _ = _halves(tl.load(pairs + step * rows, mask=step * rows + i < d_k, other=0))
        k = k[:, None]
        s0, s1, s2, s3 = (
            _byte(held[step], 0),
            _byte(held[step], 1),
            _byte(held[step], 2),
            _byte(held[step], 3),
        )
        s0, s1, s2, s3 = s0 + k * w0, s1 + k * w1, s2 + k * w2, s3 + k * w3
        m0, m1 = tl.maximum(m0, tl.abs(s0)), tl.maximum(m1, tl.abs(s1))
        m2, m3 = tl.maximum(m2, tl.abs(s2)), tl.maximum(m3, tl.abs(s3))
        moved += (s0, s1, s2, s3)
    m0, m1, m2, m3 = tl.reduce((m0, m1, m2, m3), 0, _larger)
    d0, i0 = _scales(m0, d0, u0)
    d1, i1 = _scales(m1, d1, u1)
    d2, i2 = _scales(m2, d2, u2)
    d3, i3 = _scales(m3, d3, u3)
    for step in tl.static_range(steps):
        mask = (step * rows + i < d_k)[:, None] & j_mask[None, :]
        s0, s1 = _code(moved[4 * step], i0), _code(moved[4 * step + 1], i1)
        s2, s3 = _code(moved[4 * step + 2], i2), _code(moved[4 * step + 3], i3)
        tl.store(tile + step * rows * width, _word(s0, s1, s2, s3), mask=mask)
    tl.store(units, d0, mask=j_mask)
    tl.store(units + 1, d1, mask=j_mask)
    tl.store(units + 2, d2, mask=j_mask)
    tl.store(units + 3, d3, mask=j_mask)
