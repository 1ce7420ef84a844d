"""Triton functions that move a state in 8 bits on by one token, within `modeling.runtime.gpu.kernels.delta.mixer_step`.

Codes are read and written as words of four neighbouring columns. With a word to a thread, a warp reads whole rows of up
to 128 columns, and all of a thread's elements are of the same four: sums over rows stay within threads, but for one
exchange between warps. Read as bytes, sixteen columns went to each thread, and most of the time into their sums.
"""

import triton
import triton.language as tl

from modeling.runtime.gpu.kernels.rounding import rounded, scales_of


@triton.jit
def _split(x, words: tl.constexpr):
    """`[4 * words]` as four `[words]`: every fourth element, from the first to the fourth on."""
    even, odd = tl.split(tl.reshape(x, [words, 2, 2]))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _joined(first, second, third, fourth, words: tl.constexpr):
    """What `_split` has split."""
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), [4 * words])


@triton.jit
def _byte(packed, place: tl.constexpr):
    """One of the four codes in each word."""
    return ((packed << (24 - 8 * place)) >> 24).to(tl.float32)


@triton.jit
def _add(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7


@triton.jit
def _larger(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.maximum(a1, b1), tl.maximum(a2, b2), tl.maximum(a3, b3)


@triton.jit
def moved_on(packed, scale, q, k, v, decay, beta, words: tl.constexpr):
    """One token, by whole columns of a head's state.

    Args:
        packed: the codes, int32 `[d_k, words]`, four columns in each.
        scale, v: `[4 * words]`.
        q, k: `[d_k]`, q scaled.

    Returns:
        The codes and scales after the token, and o `[4 * words]`.
    """
    q, k = q[:, None], k[:, None]
    s0, s1, s2, s3 = _byte(packed, 0), _byte(packed, 1), _byte(packed, 2), _byte(packed, 3)
    # All sums over rows at once, so that warps exchange theirs once.
    k0, k1, k2, k3, q0, q1, q2, q3 = tl.reduce(
        (s0 * k, s1 * k, s2 * k, s3 * k, s0 * q, s1 * q, s2 * q, s3 * q), 0, _add
    )
    kq = tl.sum(tl.sum(k * q, axis=1), axis=0)
    d0, d1, d2, d3 = _split(scale * decay, words)
    v0, v1, v2, v3 = _split(v, words)
    u0, u1, u2, u3 = (
        beta * (v0 - d0 * k0),
        beta * (v1 - d1 * k1),
        beta * (v2 - d2 * k2),
        beta * (v3 - d3 * k3),
    )
    o = _joined(d0 * q0 + u0 * kq, d1 * q1 + u1 * kq, d2 * q2 + u2 * kq, d3 * q3 + u3 * kq, words)
    s0 = s0 * d0[None, :] + k * u0[None, :]
    s1 = s1 * d1[None, :] + k * u1[None, :]
    s2 = s2 * d2[None, :] + k * u2[None, :]
    s3 = s3 * d3[None, :] + k * u3[None, :]
    m0, m1, m2, m3 = tl.reduce((tl.abs(s0), tl.abs(s1), tl.abs(s2), tl.abs(s3)), 0, _larger)
    m0, i0 = scales_of(m0, u0)
    m1, i1 = scales_of(m1, u1)
    m2, i2 = scales_of(m2, u2)
    m3, i3 = scales_of(m3, u3)
    low = (rounded(s0, i0) & 255) | ((rounded(s1, i1) & 255) << 8)
    high = ((rounded(s2, i2) & 255) << 16) | (rounded(s3, i3) << 24)
    return low | high, _joined(m0, m1, m2, m3, words), o
