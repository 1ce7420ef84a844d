"""The decode step of a mixer as one Triton kernel, in place on the slot pool.

Bound by memory: per request and layer it reads and writes the recurrent state once (`num_v_heads * d_k * d_v`
elements), and everything else it touches is a few percent of that. One program owns one key head of one request: the
value heads that read the same q and k take turns in it, so that nobody else reads the convolution's history of q and
k while it moves on. A state is worked on in columns `[d_k, block_v]` held in registers; a column needs nothing of its
neighbours until the output norm, for which the whole head's o stays in registers.

Arithmetic is float32 whatever the pool's, the parameters' and the activations' dtypes are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from modeling.layers import L2_EPS, Mixer

TILE = 16384
"""Elements of state that a program holds at a time, at most."""
ELEMENTS_PER_WARP = 2048
"""64 registers of a thread for the state: enough bytes in flight, and room for two programs on a multiprocessor."""


@triton.jit
def _window(projected, history, channels, mask, taps: tl.constexpr, columns: tl.constexpr):
    """`[channels, columns]`: the last `taps - 1` inputs, the new one, then zeros up to a power of two."""
    j = tl.arange(0, columns)[None, :]
    old = history + channels[:, None] * (taps - 1) + j
    new = projected + channels[:, None] + j * 0
    return tl.load(old, mask=mask[:, None] & (j < taps - 1), other=0.0).to(tl.float32) + tl.load(
        new, mask=mask[:, None] & (j == taps - 1), other=0.0
    ).to(tl.float32)


@triton.jit
def _move_on(window, history, channels, mask, taps: tl.constexpr, columns: tl.constexpr):
    """Drop the oldest input of the history and append the new one."""
    j = tl.arange(0, columns)[None, :]
    target = history + channels[:, None] * (taps - 1) + j - 1
    tl.store(target, window.to(history.dtype.element_ty), mask=mask[:, None] & (j > 0) & (j < taps))


@triton.jit
def _convolve(
    window, weight, bias, channels, mask, taps: tl.constexpr, columns: tl.constexpr, has_bias: tl.constexpr
):
    """Depthwise convolution and SiLU, `[channels]`."""
    j = tl.arange(0, columns)[None, :]
    w = tl.load(weight + channels[:, None] * taps + j, mask=mask[:, None] & (j < taps), other=0.0)
    y = tl.sum(window * w.to(tl.float32), axis=1)
    if has_bias:
        y += tl.load(bias + channels, mask=mask, other=0.0).to(tl.float32)
    return y * tl.sigmoid(y)


@triton.jit
def _step(
    projected,  # [B, sum(in_proj_sizes)]
    out,  # [B, value_dim]
    recurrent,  # [slots, num_v_heads, d_k, d_v]
    conv,  # [slots, conv_channels, taps - 1]
    slots,  # [B]
    conv_weight,  # [conv_channels, taps]
    conv_bias,
    a_log,
    dt_bias,
    norm_weight,
    row_stride,
    d_k,
    scale,
    beta_scale,
    norm_eps,
    l2_eps,
    num_k_heads: tl.constexpr,
    groups: tl.constexpr,
    d_v: tl.constexpr,
    taps: tl.constexpr,
    has_bias: tl.constexpr,
    has_decay: tl.constexpr,
    has_beta: tl.constexpr,
    gate: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
    blocks: tl.constexpr,
    columns: tl.constexpr,
):
    num_v_heads: tl.constexpr = num_k_heads * groups
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    key_dim = num_k_heads * d_k
    conv_channels = 2 * key_dim + num_v_heads * d_v
    projected += row * row_stride
    out += row * num_v_heads * d_v
    history = conv + slot * conv_channels * (taps - 1)
    gate_at = projected + conv_channels
    beta_at = gate_at
    if gate != "none":
        beta_at += num_v_heads * d_v
    decay_at = beta_at
    if has_beta:
        decay_at += num_v_heads

    k_index = tl.arange(0, block_k)
    k_mask = k_index < d_k
    q_channels = head * d_k + k_index
    k_channels = key_dim + q_channels
    q_window = _window(projected, history, q_channels, k_mask, taps, columns)
    k_window = _window(projected, history, k_channels, k_mask, taps, columns)

    # o of a head, [blocks, block_v]: a block's row is filled when its columns are done.
    o_index = tl.arange(0, blocks)[:, None] * block_v + tl.arange(0, block_v)[None, :]
    o_mask = o_index < d_v
    for group in tl.static_range(groups):
        v_head = head * groups + group
        if has_beta:
            beta = tl.sigmoid(tl.load(beta_at + v_head).to(tl.float32)) * beta_scale
        else:
            beta = beta_scale
        if has_decay:
            x = tl.load(decay_at + v_head).to(tl.float32) + tl.load(dt_bias + v_head)
            softplus = tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(x)))
            decay = tl.exp(-tl.exp(tl.load(a_log + v_head)) * softplus)
        o = tl.zeros([blocks, block_v], tl.float32)
        for block in tl.static_range(blocks):
            v_index = block * block_v + tl.arange(0, block_v)
            v_mask = v_index < d_v
            v_channels = 2 * key_dim + v_head * d_v + v_index
            v_window = _window(projected, history, v_channels, v_mask, taps, columns)
            tile = (slot * num_v_heads + v_head) * d_k * d_v + k_index[:, None] * d_v + v_index[None, :]
            tile_mask = k_mask[:, None] & v_mask[None, :]
            # The state is asked for before q and k are worked out: their latency hides behind it.
            state = tl.load(recurrent + tile, mask=tile_mask, other=0.0).to(tl.float32)
            if group == 0 and block == 0:
                q = _convolve(q_window, conv_weight, conv_bias, q_channels, k_mask, taps, columns, has_bias)
                k = _convolve(k_window, conv_weight, conv_bias, k_channels, k_mask, taps, columns, has_bias)
                q *= tl.rsqrt(tl.sum(q * q, axis=0) + l2_eps) * scale
                k *= tl.rsqrt(tl.sum(k * k, axis=0) + l2_eps)
            v = _convolve(v_window, conv_weight, conv_bias, v_channels, v_mask, taps, columns, has_bias)
            if has_decay:
                state *= decay
            u = beta * (v - tl.sum(state * k[:, None], axis=0))
            state += k[:, None] * u[None, :]
            tl.store(recurrent + tile, state.to(recurrent.dtype.element_ty), mask=tile_mask)
            o_block = tl.sum(state * q[:, None], axis=0)
            o = tl.where(tl.arange(0, blocks)[:, None] == block, o_block[None, :], o)
            # Threads may hold copies of a channel: all must have read the history before one writes it.
            tl.debug_barrier()
            _move_on(v_window, history, v_channels, v_mask, taps, columns)
        mean_square = tl.sum(tl.sum(tl.where(o_mask, o * o, 0.0), axis=1), axis=0) / d_v
        o *= tl.rsqrt(mean_square + norm_eps)
        o *= tl.load(norm_weight + o_index, mask=o_mask, other=0.0).to(tl.float32)
        if gate != "none":
            z = tl.load(gate_at + v_head * d_v + o_index, mask=o_mask, other=0.0).to(tl.float32)
            o *= tl.sigmoid(z)
            if gate == "silu":
                o *= z
        tl.store(out + v_head * d_v + o_index, o.to(out.dtype.element_ty), mask=o_mask)
    _move_on(q_window, history, q_channels, k_mask, taps, columns)
    _move_on(k_window, history, k_channels, k_mask, taps, columns)


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
    _step[(s.num_k_heads, projected.shape[0])](
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
        has_bias=s.conv_bias,
        has_decay=s.has_decay,
        has_beta=s.has_beta,
        gate=s.gate,
        block_k=block_k,
        block_v=block_v,
        blocks=width // block_v,
        columns=triton.next_power_of_2(s.conv_kernel),
        num_warps=min(max(block_k * block_v // ELEMENTS_PER_WARP, 1), 8),
    )
    return out
