"""Triton kernels of a decode step. `triton_step` launches them and says what they compute.

The state of a key head's value heads belongs to one program: they take turns in it, so that nobody else reads the
convolution's history of q and k while it moves on. A state is worked on in columns `[d_k, block_v]` held in registers;
a column needs nothing of its neighbours until the output norm, for which the whole head's o stays in registers.
Arithmetic is float32 whatever the tensors' dtypes are.

Shapes that look roundabout (q and k as two rows, v as one column, each summed back into a vector) keep the compiler
from loading the convolution's inputs in the layout of the state, once per warp and element: see docs/gpu.md.
"""

import triton
import triton.language as tl


@triton.jit
def _convolve(projected, history, weight, bias, channels, mask, taps: tl.constexpr, has_bias: tl.constexpr):
    """Depthwise convolution of the last `taps - 1` inputs and the new one, then SiLU, in the shape of `channels`."""
    y = tl.load(projected + channels, mask=mask, other=0.0).to(tl.float32)
    y *= tl.load(weight + channels * taps + taps - 1, mask=mask, other=0.0).to(tl.float32)
    for tap in tl.static_range(taps - 1):
        x = tl.load(history + channels * (taps - 1) + tap, mask=mask, other=0.0).to(tl.float32)
        y += x * tl.load(weight + channels * taps + tap, mask=mask, other=0.0).to(tl.float32)
    if has_bias:
        y += tl.load(bias + channels, mask=mask, other=0.0).to(tl.float32)
    return y * tl.sigmoid(y)


@triton.jit
def _move_on(projected, history, channels, mask, taps: tl.constexpr):
    """Drop the oldest input of the history and append the new one. Threads may hold copies of a channel: all must have
    convolved, with a barrier behind them, before one of them comes here."""
    for tap in tl.static_range(taps - 2):
        x = tl.load(history + channels * (taps - 1) + tap + 1, mask=mask, other=0.0)
        tl.store(history + channels * (taps - 1) + tap, x, mask=mask)
    if taps > 1:
        x = tl.load(projected + channels, mask=mask, other=0.0)
        tl.store(history + channels * (taps - 1) + taps - 2, x.to(history.dtype.element_ty), mask=mask)


@triton.jit
def mixer_step(
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
    part = tl.arange(0, 2)[:, None]  # q and k
    qk_channels = part * key_dim + head * d_k + k_index[None, :]
    qk_mask = (part < 2) & k_mask[None, :]
    qk = _convolve(projected, history, conv_weight, conv_bias, qk_channels, qk_mask, taps, has_bias)

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
            v_channels = (2 * key_dim + v_head * d_v + v_index)[:, None]
            v_one = _convolve(
                projected, history, conv_weight, conv_bias, v_channels, v_mask[:, None], taps, has_bias
            )
            v = tl.sum(v_one, axis=1)
            tile = (slot * num_v_heads + v_head) * d_k * d_v + k_index[:, None] * d_v + v_index[None, :]
            tile_mask = k_mask[:, None] & v_mask[None, :]
            state = tl.load(recurrent + tile, mask=tile_mask, other=0.0).to(tl.float32)
            # Only now, with the state asked for: this takes barriers, and its wait hides behind that one.
            if group == 0 and block == 0:
                qk *= tl.rsqrt(tl.sum(qk * qk, axis=1) + l2_eps)[:, None]
                q = tl.sum(tl.where(part == 0, qk, 0.0), axis=0) * scale
                k = tl.sum(tl.where(part == 1, qk, 0.0), axis=0)
            if has_decay:
                state *= decay
            u = beta * (v - tl.sum(state * k[:, None], axis=0))
            state += k[:, None] * u[None, :]
            tl.store(recurrent + tile, state.to(recurrent.dtype.element_ty), mask=tile_mask)
            o_block = tl.sum(state * q[:, None], axis=0)
            o = tl.where(tl.arange(0, blocks)[:, None] == block, o_block[None, :], o)
            tl.debug_barrier()
            _move_on(projected, history, v_channels, v_mask[:, None], taps)
        mean_square = tl.sum(tl.sum(tl.where(o_mask, o * o, 0.0), axis=1), axis=0) / d_v
        o *= tl.rsqrt(mean_square + norm_eps)
        o *= tl.load(norm_weight + o_index, mask=o_mask, other=0.0).to(tl.float32)
        if gate != "none":
            z = tl.load(gate_at + v_head * d_v + o_index, mask=o_mask, other=0.0).to(tl.float32)
            o *= tl.sigmoid(z)
            if gate == "silu":
                o *= z
        tl.store(out + v_head * d_v + o_index, o.to(out.dtype.element_ty), mask=o_mask)
    _move_on(projected, history, qk_channels, qk_mask, taps)


@triton.jit
def rms_norm(x, weight, out, eps, size: tl.constexpr, block: tl.constexpr):
    """One row of `[rows, size]` per program."""
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, block)
    mask = index < size
    y = tl.load(x + row * size + index, mask=mask, other=0.0).to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, axis=0) / size + eps)
    y *= tl.load(weight + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + index, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu(x, out, size, block: tl.constexpr):
    """silu(gate) * up of one row's `block` columns; x is `[rows, 2 * size]`, rows `gate | up`."""
    row = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0) * block + tl.arange(0, block)
    mask = index < size
    gate = tl.load(x + row * 2 * size + index, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + row * 2 * size + size + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * size + index, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)
