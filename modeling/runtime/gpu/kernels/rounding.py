"""Triton kernels of recurrent states in 8 bits; `modeling.state.rounding` says how they are kept."""

import triton
import triton.language as tl

from modeling.state import rounding

LEVELS = tl.constexpr(float(rounding.LEVELS))
SMALLEST = tl.constexpr(rounding.SMALLEST)
ROUNDING = tl.constexpr(1.5 * 2.0**23)
"""Added to a number of at most 2^22 in size it leaves no bits for fractions: the sum's last bits are the nearest whole
number, ties to even."""


@triton.jit
def scales_of(largest, broken):
    """The scales of columns and what to multiply their entries by, of any shape, given the largest entries. `broken` is
    NaN or Inf for a column that holds one: a maximum does not see NaN."""
    none = largest < SMALLEST
    inverse = tl.where(none, 0.0, tl.div_rn(tl.zeros_like(largest) + LEVELS, tl.maximum(largest, SMALLEST)))
    return tl.where(none, 0.0, largest * (1 / LEVELS)) + broken * 0.0, inverse


@triton.jit
def rounded(state, inverse):
    """The codes of entries float32 `[d_k, columns]` as the last bytes of int32 like them; `inverse` is `[columns]`."""
    units = tl.fma(state, tl.broadcast_to(inverse[None, :], state.shape), tl.zeros_like(state) + ROUNDING)
    return units.to(tl.int32, bitcast=True)


@triton.jit
def widen_rows(
    recurrent,  # [slots, num_v_heads, d_k, d_v]
    scales,  # [slots, num_v_heads, d_v]
    slots,  # [rows]
    out,  # [rows, num_v_heads, d_k, d_v]
    d_k,
    d_v,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
):
    """Columns of a head's state to a program."""
    row, head, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    i = tl.arange(0, block_k)[:, None]
    j = block * block_v + tl.arange(0, block_v)
    mask = (i < d_k) & (j < d_v)[None, :]
    heads = tl.num_programs(1)
    place = i * d_v + j[None, :]
    codes = tl.load(recurrent + (slot * heads + head) * d_k * d_v + place, mask=mask, other=0)
    scale = tl.load(scales + (slot * heads + head) * d_v + j, mask=j < d_v, other=0.0)
    tl.store(out + (row * heads + head) * d_k * d_v + place, codes.to(tl.float32) * scale[None, :], mask=mask)


@triton.jit
def narrow_rows(
    wide,  # [rows, num_v_heads, d_k, d_v], float32
    slots,  # [rows]
    recurrent,  # [slots, num_v_heads, d_k, d_v]
    scales,  # [slots, num_v_heads, d_v]
    d_k,
    d_v,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
):
    """Columns of a head's state to a program."""
    row, head, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    slot = tl.load(slots + row).to(tl.int64)
    i = tl.arange(0, block_k)[:, None]
    j = block * block_v + tl.arange(0, block_v)
    mask = (i < d_k) & (j < d_v)[None, :]
    heads = tl.num_programs(1)
    place = i * d_v + j[None, :]
    state = tl.load(wide + (row * heads + head) * d_k * d_v + place, mask=mask, other=0.0)
    scale, inverse = scales_of(tl.max(tl.abs(state), axis=0), tl.sum(state * 0.0, axis=0))
    codes = rounded(state, inverse).to(tl.int8)
    tl.store(recurrent + (slot * heads + head) * d_k * d_v + place, codes, mask=mask)
    tl.store(scales + (slot * heads + head) * d_v + j, scale, mask=j < d_v)
