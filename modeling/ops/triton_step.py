"""Decode steps by Triton kernels, in place on the slot pool.

A mixer's step is bound by memory: per request and layer it reads and writes the recurrent state once (`num_v_heads *
d_k * d_v` elements), and everything else it touches is a few percent of that. The rest of a block is matrix products,
and small work between them that would cost more to launch than to do: one kernel each for a norm and for SwiGLU, the
residual sums inside the products.
"""

import torch
import triton
from torch import Tensor

from modeling.layers import L2_EPS, Block, Mixer, MixerStep, RMSNorm
from modeling.ops.triton_kernels import mixer_step, rms_norm, swiglu

TILE = 16384
"""Elements of state that a program holds at a time, at most."""
ELEMENTS_PER_WARP = 2048
MAX_WARPS = 4
"""More warps hold less each, but wait for each other more: measured, docs/gpu.md."""
SWIGLU_BLOCK = 1024


def triton_step(mixer: Mixer, projected: Tensor, recurrent: Tensor, conv: Tensor, slots: Tensor) -> Tensor:
    """`MixerStep` as one Triton kernel, for CUDA tensors of float32, bfloat16 or float16.

    Slots that occur more than once get states and outputs of no meaning (`DecodeGraphs`' null slot), nobody else's do.

    Raises:
        ValueError: float64 tensors, whose precision the kernel would silently lose.
    """
    if torch.float64 in (projected.dtype, recurrent.dtype, conv.dtype):
        raise ValueError("the Triton decode step computes in float32; for float64 use the torch back end")
    s = mixer.spec
    block_k = triton.next_power_of_2(s.d_k)
    width = triton.next_power_of_2(s.d_v)
    block_v = min(width, max(TILE // block_k, 16))
    out = projected.new_empty(projected.shape[0], s.value_dim)
    mixer_step[(s.num_k_heads, projected.shape[0])](
        projected,
        out,
        recurrent,
        conv,
        slots,
        mixer.conv.weight,
        mixer.conv.bias,
        mixer.A_log if s.has_decay else None,
        mixer.dt_bias if s.has_decay else None,
        mixer.o_norm.weight,
        projected.stride(0),
        s.d_k,
        s.d_k**-0.5,
        s.beta_scale,
        s.norm_eps,
        L2_EPS,
        num_k_heads=s.num_k_heads,
        groups=s.num_v_heads // s.num_k_heads,
        d_v=s.d_v,
        taps=s.conv_kernel,
        has_decay=s.has_decay,
        has_beta=s.has_beta,
        gate=s.gate,
        block_k=block_k,
        block_v=block_v,
        blocks=width // block_v,
        columns=triton.next_power_of_2(s.conv_kernel),
        num_warps=min(max(block_k * block_v // ELEMENTS_PER_WARP, 1), MAX_WARPS),
    )
    return out


def _normed(norm: RMSNorm, x: Tensor) -> Tensor:
    rows, size = x.shape
    out = torch.empty_like(x)
    rms_norm[(rows,)](
        x, norm.weight, out, norm.eps, size=size, block=triton.next_power_of_2(size), num_warps=4
    )
    return out


def triton_block(
    block: Block, x: Tensor, recurrent: Tensor, conv: Tensor, slots: Tensor, step: MixerStep
) -> Tensor:
    """`BlockStep` with the small work between the products fused; x is overwritten."""
    mixer, mlp = block.mixer, block.mlp
    y = step(mixer, mixer.in_proj(_normed(block.mixer_norm, x)), recurrent, conv, slots)
    x.addmm_(y, mixer.o_proj.weight.t())
    z = mlp.in_proj(_normed(block.mlp_norm, x))
    rows, size = z.shape[0], z.shape[1] // 2
    out = z.new_empty(rows, size)
    swiglu[(triton.cdiv(size, SWIGLU_BLOCK), rows)](z, out, size, block=SWIGLU_BLOCK)
    return x.addmm_(out, mlp.out_proj.weight.t())
