"""A decode step of the (gated) delta rule mixer by a Triton kernel.

It is bound by memory: per request and layer it reads and writes the recurrent state once (`num_v_heads *
d_k * d_v` elements), and everything else it touches is a few percent of that.
"""

from functools import cache

import torch
from torch import Tensor

from modeling.layers import L2_EPS, DeltaMixer, RMSNorm
from modeling.runtime.gpu.delta_int8 import delta_step_int8
from modeling.runtime.gpu.kernels.delta import mixer_step
from modeling.runtime.gpu.products import product
from modeling.runtime.gpu.sizes import power_of_2
from modeling.state import DeltaState

TILES = {4: 16384, 2: 8192}
"""Elements of state that a program holds at a time, at most, by the bytes of one. In registers they are float32 either
way; with half the bytes on their way from memory, more programs must run at once to hide its latency."""
ELEMENTS_PER_WARP = 4096
"""More warps hold less each, but wait for each other more: measured, docs/gpu.md."""
MOST_ROWS_IN_PARALLEL = 8
"""Requests up to which each value head has a program of its own: fewer leave much of a GPU idle."""


def delta_step(mixer: DeltaMixer, projected: Tensor, state: DeltaState, slots: Tensor) -> Tensor:
    """`DeltaMixer.step` as one Triton kernel, or three where states are in int8, for CUDA tensors of float32, bfloat16
    or float16.

    Slots that occur more than once get states and outputs of no meaning (`DecodeGraphs`' null slot), nobody else's do.

    Raises:
        ValueError: float64 tensors, whose precision the kernel would silently lose.
    """
    if torch.float64 in (projected.dtype, state.recurrent.dtype, state.conv.dtype):
        raise ValueError("the Triton decode step computes in float32; for float64 use the torch runtime")
    if state.scales is not None:
        return delta_step_int8(mixer, projected, state, slots)
    s = mixer.spec
    block_k = power_of_2(s.d_k)
    width = power_of_2(s.d_v)
    block_v = min(width, max(TILES[state.recurrent.element_size()] // block_k, 16))
    rows, groups = projected.shape[0], s.num_v_heads // s.num_k_heads
    turns = 1 if rows <= MOST_ROWS_IN_PARALLEL else groups
    out = projected.new_empty(rows, s.value_dim)
    mixer_step[(s.num_v_heads // turns, rows)](
        projected,
        out,
        state.recurrent,
        state.conv,
        slots,
        mixer.conv.weight,
        mixer.conv.bias,
        mixer.A_log if s.has_decay else None,
        mixer.dt_bias if s.has_decay else None,
        mixer.o_norm.weight,
        zero_counters(projected.device, rows * s.num_k_heads) if turns < groups else None,
        projected.stride(0),
        s.d_k,
        s.d_k**-0.5,
        s.beta_scale,
        s.norm_eps,
        L2_EPS,
        num_k_heads=s.num_k_heads,
        groups=groups,
        turns=turns,
        d_v=s.d_v,
        taps=s.conv_kernel,
        has_decay=s.has_decay,
        has_beta=s.has_beta,
        gate=s.gate,
        block_k=block_k,
        block_v=block_v,
        blocks=width // block_v,
        columns=power_of_2(s.conv_kernel),
        num_warps=max(block_k * block_v // ELEMENTS_PER_WARP, 1),
    )
    return out


def add_delta(
    mixer: DeltaMixer,
    x: Tensor,
    norm: RMSNorm | None,
    residual: Tensor | None,
    state: DeltaState,
    slots: Tensor,
) -> Tensor:
    """A decode step of x `[B, hidden]`, added to the residual, as `modeling.runtime.gpu.runtime` says; the states move
    on in place."""
    y = delta_step(mixer, product(x, mixer.in_proj.weight, norm), state, slots)
    return product(y, mixer.o_proj.weight, residual=residual)


@cache
def zero_counters(device: torch.device, count: int) -> Tensor:
    """Zeros that programs of a step count themselves in, and leave as zeros for the next step: steps run one after the
    other, on one stream."""
    return torch.zeros(count, dtype=torch.int32, device=device)
