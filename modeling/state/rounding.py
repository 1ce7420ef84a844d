"""Recurrent states in 8 bits.

Each column of a head's state, all key channels of one value channel, has a scale of its own: its largest entry over
127. The columns that a kernel holds then need nothing of the others. An entry is kept as the whole number that is
nearest to it in units of the scale. Kernels round by the same operations in the same order, so that equal float32
states give equal bytes, wherever there is an instruction that multiplies and adds and rounds once.
"""

import torch
from torch import Tensor

LEVELS = 127
"""The largest whole number that an entry is kept as; -128 is not used, so that a state and its negative are alike."""

SMALLEST = 2.0**-100
"""A column whose largest entry is smaller is kept as zeros: float32 could not hold the inverse of its scale."""


def narrow(state: Tensor) -> tuple[Tensor, Tensor]:
    """A state `[..., d_k, d_v]` in any float dtype -> codes int8 like it, and scales float32 `[..., d_v]`.

    The scale of a column that holds NaN or Inf is NaN, and so is whatever is read from it; its codes mean nothing.
    """
    state = state.float()
    largest = state.abs().amax(-2)
    largest = largest.masked_fill(largest < SMALLEST, 0.0).masked_fill(largest.isinf(), torch.nan)
    # A number over a tensor would be its reciprocal times the number, which is rounded twice.
    inverse = (torch.full_like(largest, LEVELS) / largest).masked_fill(largest == 0, 0.0)
    # Products of two float32 numbers are exact in float64: they are rounded once, as by a fused multiply and add.
    codes = state.double().mul_(inverse.double().unsqueeze(-2)).round_().nan_to_num_(nan=0.0)
    return codes.to(torch.int8), largest * (1 / LEVELS)


def widen(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 state `[..., d_k, d_v]` that codes like it and scales `[..., d_v]` stand for."""
    return codes * scales.unsqueeze(-2)
