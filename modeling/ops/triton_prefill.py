"""Prefill between a mixer's input projection and the gated delta rule, by one Triton kernel.

In plain torch the convolution of a packed batch is a dozen passes over `[tokens, channels]` in float32, more bytes than
all the rest of a layer moves. Here each input is read once (and again from the cache, for each tap), and what is
written is what the rule reads: q and k normalised, each in a tensor of its own.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from modeling.layers import L2_EPS, Mixer
from modeling.ops.packing import CHUNK, packing
from modeling.ops.triton_kernels import convolve_packed


def triton_inputs(
    mixer: Mixer, qkv: Tensor, cu_seqlens: Sequence[int], state: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`MixerInputs` for serving: not differentiable, arithmetic in float32, q, k and v in qkv's dtype.

    Raises:
        ValueError: float64 tensors, whose precision the kernel would silently lose.
    """
    if qkv.dtype == torch.float64:
        raise ValueError("the Triton convolution computes in float32; for float64 use the torch back end")
    s = mixer.spec
    tokens, channels = qkv.shape
    packed = packing(cu_seqlens, qkv.device)
    after = qkv.new_empty(len(cu_seqlens) - 1, channels, s.conv_kernel - 1)
    out = qkv.new_empty(tokens * channels)
    convolve_packed[(len(packed.chunks), 2 * s.num_k_heads + s.num_v_heads)](
        qkv,
        None if state is None else state.transpose(1, 2).contiguous(),  # a row of channels is one wide load
        after,
        out,
        mixer.conv.weight,
        mixer.conv.bias,
        packed.offsets,
        packed.chunks,
        tokens,
        qkv.stride(0),
        s.d_k,
        L2_EPS,
        num_k_heads=s.num_k_heads,
        num_v_heads=s.num_v_heads,
        d_v=s.d_v,
        taps=s.conv_kernel,
        chunk=CHUNK,
        block=triton.next_power_of_2(max(s.d_k, s.d_v)),
    )
    q, k, v = out.split([tokens * s.key_dim, tokens * s.key_dim, tokens * s.value_dim])
    q, k = q.view(tokens, s.num_k_heads, s.d_k), k.view(tokens, s.num_k_heads, s.d_k)
    return q, k, v.view(tokens, s.num_v_heads, s.d_v), after
