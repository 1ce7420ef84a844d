"""A decode step of the (gated) delta rule mixer with states in 8 bits: convolution, state and output norm by a Triton
kernel each."""

import torch
from torch import Tensor

from modeling.layers import L2_EPS, DeltaMixer
from modeling.runtime.gpu.kernels.delta_int8 import convolve_step, move_states_on
from modeling.runtime.gpu.prefill import normed_output
from modeling.runtime.gpu.sizes import ceil_div, power_of_2
from modeling.state import DeltaState

WORD = 4
"""Columns of a state that are read and written together."""
TILE = 16384
"""Elements of state that a program holds at a time, at most."""
ELEMENTS_PER_WARP = 4096
"""More warps hold less each, but wait for each other more; docs/gpu.md has what was measured."""


def delta_step_int8(mixer: DeltaMixer, projected: Tensor, state: DeltaState, slots: Tensor) -> Tensor:
    """`DeltaMixer.step` of states in int8, as `modeling.runtime.gpu.delta.delta_step`. d_v must be a multiple of `WORD`
    (`GpuRuntime.check_states`)."""
    s = mixer.spec
    batch = projected.shape[0]
    qkv = projected.new_empty(batch, s.conv_channels, dtype=torch.float32)
    convolve_step[(batch, 2 * s.num_k_heads + s.num_v_heads)](
        projected,
        state.conv,
        slots,
        qkv,
        mixer.conv.weight,
        mixer.conv.bias,
        projected.stride(0),
        s.d_k,
        s.d_k**-0.5,
        L2_EPS,
        num_k_heads=s.num_k_heads,
        num_v_heads=s.num_v_heads,
        d_v=s.d_v,
        taps=s.conv_kernel,
        block=power_of_2(max(s.d_k, s.d_v)),
        columns=power_of_2(s.conv_kernel),
        num_warps=1,
    )
    o = qkv.new_empty(batch, s.num_v_heads, s.d_v)
    block_k = power_of_2(s.d_k)
    block_v = min(power_of_2(s.d_v), max(TILE // block_k, 16))
    move_states_on[(batch, s.num_v_heads, ceil_div(s.d_v, block_v))](
        qkv,
        projected,
        state.recurrent.view(torch.int32),
        state.scales,
        slots,
        o,
        mixer.A_log if s.has_decay else None,
        mixer.dt_bias if s.has_decay else None,
        projected.stride(0),
        sum(s.in_proj_sizes[:2]),
        s.beta_scale,
        num_v_heads=s.num_v_heads,
        groups=s.num_v_heads // s.num_k_heads,
        d_k=s.d_k,  # fixed, unlike in other kernels: masks and addresses would be a third of the instructions
        d_v=s.d_v,
        has_decay=s.has_decay,
        has_beta=s.has_beta,
        block_k=block_k,
        block_w=block_v // WORD,
        num_warps=max(block_k * block_v // ELEMENTS_PER_WARP, 1),
    )
    return normed_output(mixer, o, projected)
