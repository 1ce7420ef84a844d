"""Prompts through the (gated) delta rule mixer by Triton kernels.

Launching a kernel takes the host longer than most of these take a GPU for a few thousand tokens. What is small is
therefore done in few launches, and nothing is copied or cast on the way from one kernel to the next.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modeling.layers import L2_EPS, DeltaMixer, RMSNorm
from modeling.ops import GatedDeltaRule, RuleInputs
from modeling.runtime.gpu.kernels.delta import convolve_packed, gated_norm, gates
from modeling.runtime.gpu.packing import packing
from modeling.runtime.gpu.products import product
from modeling.runtime.gpu.rounding import narrow_into, widened
from modeling.runtime.gpu.sizes import ceil_div, power_of_2
from modeling.spec import TOKEN_BLOCK
from modeling.state import DeltaState

GATES_BLOCK = 32
"""Tokens that a program of `gates` takes."""
NORM_ELEMENTS = 4096
"""Elements that a program of `gated_norm` holds, at most."""


def add_delta_prefill(
    mixer: DeltaMixer,
    x: Tensor,
    norm: RMSNorm | None,
    residual: Tensor | None,
    cu_seqlens: Sequence[int],
    state: DeltaState,
    slots: Tensor,
    rule: GatedDeltaRule,
) -> Tensor:
    """`DeltaMixer.prefill` of x `[tokens, hidden]` with the given rule, added to the residual, as
    `modeling.runtime.gpu.runtime` says; the states move on in place."""
    projected = product(x, mixer.in_proj.weight, norm)
    q, k, v, conv = delta_heads(mixer, projected, cu_seqlens, state.conv, slots)
    beta, g = delta_gates(mixer, projected)
    is_wide = state.scales is None
    before = state.recurrent.index_select(0, slots) if is_wide else widened(state, slots)
    o, after = rule(RuleInputs(q, k, v, g, beta, mixer.spec.d_k**-0.5, cu_seqlens, before))
    if is_wide:
        state.recurrent.index_copy_(0, slots, after.to(before.dtype))
    else:
        narrow_into(state, slots, after)
    state.conv.index_copy_(0, slots, conv)
    return product(normed_output(mixer, o, projected), mixer.o_proj.weight, residual=residual)


def delta_heads(
    mixer: DeltaMixer, projected: Tensor, cu_seqlens: Sequence[int], conv: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`DeltaMixer.heads` by one Triton kernel: not differentiable, arithmetic in float32, q, k and v in projected's
    dtype.

    In plain torch the convolution of a packed batch is a dozen passes over `[tokens, channels]` in float32, more bytes
    than all the rest of a layer moves. Here each input is read once (and again from the cache, for each tap), and what
    is written is what the rule reads: q and k normalised, each in a tensor of its own.

    Args:
        projected: rows that begin with `q | k | v`, `[tokens, at least conv_channels]`.
        cu_seqlens: offsets of the packed sequences.
        conv: the pool's states of the convolution `[slots, conv_channels, conv_kernel - 1]`, which stay as they are.
        slots: int64 `[sequences]`, the rows of `conv` that the sequences go on from.

    Returns:
        q and k `[tokens, num_k_heads, d_k]`, v `[tokens, num_v_heads, d_v]`, and the new states of the convolution, a
        row for each sequence. They are not in the pool yet, since the program that has the end of a long sequence may
        be done before the one that has its beginning reads the old ones.

    Raises:
        ValueError: float64 tensors, whose precision the kernel would silently lose.
    """
    if projected.dtype == torch.float64:
        raise ValueError("the Triton convolution computes in float32; for float64 use the torch runtime")
    s = mixer.spec
    tokens = projected.shape[0]
    packed = packing(cu_seqlens, projected.device)
    after = conv.new_empty(len(cu_seqlens) - 1, s.conv_channels, s.conv_kernel - 1)
    out = projected.new_empty(tokens * s.conv_channels)
    convolve_packed[(len(packed.chunks), 2 * s.num_k_heads + s.num_v_heads)](
        projected,
        conv,
        slots,
        after,
        out,
        mixer.conv.weight,
        mixer.conv.bias,
        packed.offsets,
        packed.chunks,
        tokens,
        projected.stride(0),
        s.d_k,
        L2_EPS,
        num_k_heads=s.num_k_heads,
        num_v_heads=s.num_v_heads,
        d_v=s.d_v,
        taps=s.conv_kernel,
        chunk=TOKEN_BLOCK,
        block=power_of_2(max(s.d_k, s.d_v)),
    )
    q, k, v = out.split([tokens * s.key_dim, tokens * s.key_dim, tokens * s.value_dim])
    q, k = q.view(tokens, s.num_k_heads, s.d_k), k.view(tokens, s.num_k_heads, s.d_k)
    return q, k, v.view(tokens, s.num_v_heads, s.d_v), after


def delta_gates(mixer: DeltaMixer, projected: Tensor) -> tuple[Tensor, Tensor | None]:
    """`DeltaMixer.gates` by one Triton kernel, of the input projection's rows `[tokens, sum(in_proj_sizes)]`: beta and
    the log decay, float32 `[tokens, num_v_heads]`, the second None without decay."""
    s = mixer.spec
    tokens = projected.shape[0]
    beta = projected.new_empty(tokens, s.num_v_heads, dtype=torch.float32)
    g = torch.empty_like(beta) if s.has_decay else None
    gates[(ceil_div(tokens, GATES_BLOCK),)](
        projected,
        beta,
        g,
        mixer.A_log if s.has_decay else None,
        mixer.dt_bias if s.has_decay else None,
        tokens,
        projected.stride(0),
        sum(s.in_proj_sizes[:2]),
        s.beta_scale,
        num_v_heads=s.num_v_heads,
        has_beta=s.has_beta,
        block=GATES_BLOCK,
        width=power_of_2(s.num_v_heads),
    )
    return beta, g


def normed_output(mixer: DeltaMixer, o: Tensor, projected: Tensor) -> Tensor:
    """`DeltaMixer.gated_norm` by one Triton kernel, of o `[tokens, num_v_heads, d_v]` and the gate in the input
    projection's rows: `[tokens, value_dim]` in projected's dtype."""
    s = mixer.spec
    tokens = o.shape[0]
    block = power_of_2(s.d_v)
    heads = min(power_of_2(s.num_v_heads), max(NORM_ELEMENTS // block, 1))
    out = projected.new_empty(tokens, s.value_dim)
    gated_norm[(tokens, ceil_div(s.num_v_heads, heads))](
        o,
        projected,
        mixer.o_norm.weight,
        out,
        projected.stride(0),
        s.conv_channels,
        s.norm_eps,
        num_v_heads=s.num_v_heads,
        d_v=s.d_v,
        gate=s.gate,
        heads=heads,
        block=block,
    )
    return out
