"""Recurrent states in 8 bits around a prompt: wide for the chunk kernels, rounded once after them."""

import torch
from torch import Tensor

from modeling.runtime.gpu.kernels.rounding import narrow_rows, widen_rows
from modeling.runtime.gpu.sizes import ceil_div, power_of_2
from modeling.state import DeltaState

TILE = 4096
"""Elements of state that a program holds, at most."""


def widened(state: DeltaState, slots: Tensor) -> Tensor:
    """The int8 states at `slots` int64 `[n]` in float32, `[n, num_v_heads, d_k, d_v]`: `modeling.state.rounding.widen`
    of them."""
    assert state.scales is not None
    _, heads, d_k, d_v = state.recurrent.shape
    out = torch.empty(len(slots), heads, d_k, d_v, device=slots.device)
    block_k, block_v = _blocks(d_k, d_v)
    widen_rows[(len(slots), heads, ceil_div(d_v, block_v))](
        state.recurrent, state.scales, slots, out, d_k, d_v, block_k=block_k, block_v=block_v
    )
    return out


def narrow_into(state: DeltaState, slots: Tensor, wide: Tensor) -> None:
    """Write float32 states `[n, num_v_heads, d_k, d_v]`, contiguous, to the int8 ones at `slots` int64 `[n]`: what
    `modeling.state.rounding.narrow` makes of them."""
    assert state.scales is not None
    _, heads, d_k, d_v = state.recurrent.shape
    block_k, block_v = _blocks(d_k, d_v)
    narrow_rows[(len(slots), heads, ceil_div(d_v, block_v))](
        wide, slots, state.recurrent, state.scales, d_k, d_v, block_k=block_k, block_v=block_v
    )


def _blocks(d_k: int, d_v: int) -> tuple[int, int]:
    """Key channels and value channels that a program takes: whole columns, since a scale is of one."""
    block_k = power_of_2(d_k)
    return block_k, min(power_of_2(d_v), max(TILE // block_k, 16))
