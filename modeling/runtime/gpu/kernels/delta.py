"""Triton kernels of the (gated) delta rule mixer, for a decode step and for prompts; `modeling.runtime.gpu.delta` and
`prefill` launch them and say what they compute.

The states of a key head's value heads belong to one program, in which they take turns, so that nobody else reads the
convolution's history of q and k while it moves on. For few requests each belongs to a program of its own, and the last
of them to have read the history moves it on. A state is worked on in columns `[d_k, block_v]` held in registers;
a column needs nothing of its neighbours until the output norm, for which the whole head's o stays in registers.
Arithmetic is float32 whatever the tensors' dtypes are.

Shapes that look roundabout (q and k as two rows, v as one column, each summed back into a vector) keep the compiler
from loading the convolution's inputs in the layout of the state, once per warp and element: see docs/gpu.md.
"""

import triton
import triton.language as tl


@triton.jit
def load_inputs(projected, history, weight, channels, mask, taps: tl.constexpr, columns: tl.constexpr):
    """Loads only: the last `taps - 1` inputs, the new one, and the filter, behind the shape of `channels`."""
    j = tl.arange(0, columns)[None, None, :]
    old = tl.load(history + channels * (taps - 1) + j, mask=mask & (j < taps - 1), other=0.0)
    new = tl.load(projected + channels, mask=mask, other=0.0)
    return old, new, tl.load(weight + channels * taps + j, mask=mask & (j < taps), other=0.0)


@triton.jit
def convolve(old, new, weight, bias, channels, mask, taps: tl.constexpr, columns: tl.constexpr):
    """SiLU of the depthwise convolution, in the shape of `channels` less its last axis, and the window that it read."""
    j = tl.arange(0, columns)[None, None, :]
    window = tl.where(j == taps - 1, new.to(tl.float32), old.to(tl.float32))
    y = tl.sum(window * weight.to(tl.float32), axis=2)
    if bias is not None:
        y += tl.sum(tl.load(bias + channels, mask=mask, other=0.0).to(tl.float32), axis=2)
    return y * tl.sigmoid(y), window


@triton.jit
def move_history_on(window, history, channels, mask, taps: tl.constexpr, columns: tl.constexpr):
    """Drop the oldest input of the history and append the new one. Threads may hold copies of a channel: all must have
    read it, with a barrier behind them, before one of them comes here."""
    j = tl.arange(0, columns)[None, None, :]
    target = history + channels * (taps - 1) + j - 1
    tl.store(target, window.to(history.dtype.element_ty), mask=mask & (j > 0) & (j < taps))


@triton.jit
def log_decay_of(decay_in, shift, log_rate):
    """The logarithm of the decay: minus the rate times softplus."""
    x = decay_in.to(tl.float32) + shift
    softplus = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))  # no exp of it overflows
    return -tl.exp(log_rate) * softplus


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
    counters,  # a zero for each row and key head, and zero again in the end; or None where value heads take turns
    row_stride,
    d_k,
    scale,
    beta_scale,
    norm_eps,
    l2_eps,
    num_k_heads: tl.constexpr,
    groups: tl.constexpr,
    turns: tl.constexpr,
    d_v: tl.constexpr,
    taps: tl.constexpr,
    has_decay: tl.constexpr,
    has_beta: tl.constexpr,
    gate: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
    blocks: tl.constexpr,
    columns: tl.constexpr,
):
    num_v_heads: tl.constexpr = num_k_heads * groups
    first_head = tl.program_id(0) * turns
    head = first_head // groups
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
    qk_channels = (part * key_dim + head * d_k + k_index[None, :])[:, :, None]
    qk_mask = ((part < 2) & k_mask[None, :])[:, :, None]
    qk_old, qk_new, qk_weight = load_inputs(
        projected, history, conv_weight, qk_channels, qk_mask, taps, columns
    )

    # o of a head, [blocks, block_v]: a block's row is filled when its columns are done.
    o_index = tl.arange(0, blocks)[:, None] * block_v + tl.arange(0, block_v)[None, :]
    o_mask = o_index < d_v
    for turn in tl.static_range(turns):
        v_head = first_head + turn
        if has_beta:
            beta_in = tl.load(beta_at + v_head)
        if has_decay:
            decay_in, shift, log_rate = (
                tl.load(decay_at + v_head),
                tl.load(dt_bias + v_head),
                tl.load(a_log + v_head),
            )
        if gate != "none":
            z = tl.load(gate_at + v_head * d_v + o_index, mask=o_mask, other=0.0)
        o = tl.zeros([blocks, block_v], tl.float32)
        for block in tl.static_range(blocks):
            v_index = block * block_v + tl.arange(0, block_v)
            v_mask = (v_index < d_v)[:, None, None]
            v_channels = (2 * key_dim + v_head * d_v + v_index)[:, None, None]
            v_old, v_new, v_weight = load_inputs(
                projected, history, conv_weight, v_channels, v_mask, taps, columns
            )
            tile = (slot * num_v_heads + v_head) * d_k * d_v + k_index[:, None] * d_v + v_index[None, :]
            tile_mask = k_mask[:, None] & (v_index < d_v)[None, :]
            state = tl.load(recurrent + tile, mask=tile_mask, other=0.0).to(tl.float32)
            # From here to the first use of the state, everything hides behind its latency.
            if block == 0:
                beta = beta_scale
                if has_beta:
                    beta = tl.sigmoid(beta_in.to(tl.float32)) * beta_scale
                if has_decay:
                    decay = tl.exp(log_decay_of(decay_in, shift, log_rate))
            if turn == 0 and block == 0:
                qk, qk_window = convolve(
                    qk_old, qk_new, qk_weight, conv_bias, qk_channels, qk_mask, taps, columns
                )
                qk *= tl.rsqrt(tl.sum(qk * qk, axis=1) + l2_eps)[:, None]
                q = tl.sum(tl.where(part == 0, qk, 0.0), axis=0) * scale
                k = tl.sum(tl.where(part == 1, qk, 0.0), axis=0)
            v_column, v_window = convolve(
                v_old, v_new, v_weight, conv_bias, v_channels, v_mask, taps, columns
            )
            v = tl.sum(v_column, axis=1)
            tl.debug_barrier()
            move_history_on(v_window, history, v_channels, v_mask, taps, columns)
            if turn == 0 and block == 0:
                if turns < groups:
                    # All programs of the key head have read its history when the last one counts itself.
                    done = tl.atomic_add(counters + row * num_k_heads + head, 1)
                else:
                    move_history_on(qk_window, history, qk_channels, qk_mask, taps, columns)
            if has_decay:
                state *= decay
            u = beta * (v - tl.sum(state * k[:, None], axis=0))
            state += k[:, None] * u[None, :]
            tl.store(recurrent + tile, state.to(recurrent.dtype.element_ty), mask=tile_mask)
            o_block = tl.sum(state * q[:, None], axis=0)
            o = tl.where(tl.arange(0, blocks)[:, None] == block, o_block[None, :], o)
        o_weight = tl.load(
            norm_weight + o_index, mask=o_mask, other=0.0
        )  # before the sum, which waits for all
        mean_square = tl.sum(tl.sum(tl.where(o_mask, o * o, 0.0), axis=1), axis=0) / d_v
        o *= tl.rsqrt(mean_square + norm_eps)
        o *= o_weight.to(tl.float32)
        if gate != "none":
            z = z.to(tl.float32)
            o *= tl.sigmoid(z)
            if gate == "silu":
                o *= z
        tl.store(out + v_head * d_v + o_index, o.to(out.dtype.element_ty), mask=o_mask)
    if turns < groups:
        is_last = done == groups // turns - 1
        if is_last:
            move_history_on(qk_window, history, qk_channels, qk_mask, taps, columns)
            tl.store(counters + row * num_k_heads + head, 0)


@triton.jit(do_not_specialize=["tokens"])
def convolve_packed(
    x,  # [tokens, at least channels], rows that begin with `q | k | v`
    before,  # [slots, channels, taps - 1]
    slots,  # [sequences]
    after,  # [sequences, channels, taps - 1]
    out,  # q and k [tokens, num_k_heads, d_k] and v [tokens, num_v_heads, d_v], one after the other
    weight,  # [channels, taps]
    bias,
    offsets,  # [sequences + 1]
    chunks,  # [programs, 2]: sequence, chunk of it
    tokens,
    row_stride,
    d_k,
    l2_eps,
    num_k_heads: tl.constexpr,
    num_v_heads: tl.constexpr,
    d_v: tl.constexpr,
    taps: tl.constexpr,
    chunk: tl.constexpr,
    block: tl.constexpr,
):
    """A chunk of a sequence and a head of q, k or v to a program."""
    sequence = tl.load(chunks + 2 * tl.program_id(0))
    first = tl.load(chunks + 2 * tl.program_id(0) + 1) * chunk
    begin = tl.load(offsets + sequence)
    end = tl.load(offsets + sequence + 1)
    part = tl.program_id(1)
    key_dim = num_k_heads * d_k
    value_dim: tl.constexpr = num_v_heads * d_v
    is_v = part >= 2 * num_k_heads
    v_head = part - 2 * num_k_heads
    width = tl.where(is_v, d_v, d_k)
    channel = tl.where(is_v, 2 * key_dim + v_head * d_v, part * d_k) + tl.arange(0, block)
    mask = tl.arange(0, block) < width
    channels = 2 * key_dim + value_dim
    history = before + tl.load(slots + sequence) * channels * (taps - 1)
    t = begin + first + tl.arange(0, chunk)
    y = tl.zeros([chunk, block], tl.float32)
    for j in tl.static_range(taps):
        source = t + (j - (taps - 1))
        inside = (source >= begin) & (t < end)
        value = tl.load(
            x + source[:, None] * row_stride + channel[None, :],
            mask=inside[:, None] & mask[None, :],
            other=0.0,
        ).to(tl.float32)
        if first == 0:
            outside = (source < begin) & (t < end)
            old = tl.load(
                history + (source - begin + (taps - 1))[:, None] + channel[None, :] * (taps - 1),
                mask=outside[:, None] & mask[None, :],
                other=0.0,
            )
            value += old.to(tl.float32)
        y += value * tl.load(weight + channel * taps + j, mask=mask, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)[None, :]
    y *= tl.sigmoid(y)
    norm = tl.rsqrt(tl.sum(y * y, axis=1) + l2_eps)
    y *= tl.where(is_v, 1.0, norm)[:, None]

    is_k = (part >= num_k_heads) & (part < 2 * num_k_heads)
    stride = tl.where(is_v, value_dim, key_dim)
    total = tl.cast(tokens, tl.int64)
    start = tl.where(is_v, 2 * total * key_dim, tl.where(is_k, total * key_dim, 0))
    head = tl.where(is_v, v_head * d_v, tl.where(is_k, part - num_k_heads, part) * d_k)
    target = out + start + t[:, None] * stride + head + tl.arange(0, block)[None, :]
    tl.store(target, y.to(out.dtype.element_ty), mask=(t < end)[:, None] & mask[None, :])

    if begin + first + chunk >= end:
        for j in tl.static_range(taps - 1):
            place = end - (taps - 1) + j
            recent = tl.load(x + place * row_stride + channel, mask=mask & (place >= begin), other=0.0)
            kept = history + channel * (taps - 1) + (place - begin + (taps - 1))
            earlier = tl.load(kept, mask=mask & (place < begin), other=0.0)
            recent = tl.where(place >= begin, recent.to(earlier.dtype), earlier)
            tl.store(after + (sequence * channels + channel) * (taps - 1) + j, recent, mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def gates(
    projected,  # [tokens, ...], rows in which `beta | decay` begins at `column`
    beta,  # [tokens, num_v_heads]
    g,  # like beta, or None without decay
    a_log,
    dt_bias,
    tokens,
    row_stride,
    column,
    beta_scale,
    num_v_heads: tl.constexpr,
    has_beta: tl.constexpr,
    block: tl.constexpr,
    width: tl.constexpr,
):
    """The step size and the logarithm of the decay of `block` tokens."""
    token = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    head = tl.arange(0, width)
    heads = head < num_v_heads
    mask = (token < tokens)[:, None] & heads[None, :]
    source = projected + token[:, None] * row_stride + column + head[None, :]
    target = token[:, None] * num_v_heads + head[None, :]
    size = tl.zeros([block, width], tl.float32) + beta_scale
    if has_beta:
        size *= tl.sigmoid(tl.load(source, mask=mask, other=0.0).to(tl.float32))
        source += num_v_heads
    tl.store(beta + target, size, mask=mask)
    if g is not None:
        decay_in = tl.load(source, mask=mask, other=0.0)
        shift = tl.load(dt_bias + head, mask=heads, other=0.0).to(tl.float32)
        log_rate = tl.load(a_log + head, mask=heads, other=0.0).to(tl.float32)
        tl.store(g + target, log_decay_of(decay_in, shift[None, :], log_rate[None, :]), mask=mask)


@triton.jit
def gated_norm(
    o,  # [tokens, num_v_heads, d_v]
    projected,  # [tokens, ...], rows in which the gate, `num_v_heads * d_v`, begins at `column`
    weight,  # [d_v]
    out,  # like o
    row_stride,
    column,
    eps,
    num_v_heads: tl.constexpr,
    d_v: tl.constexpr,
    gate: tl.constexpr,
    heads: tl.constexpr,
    block: tl.constexpr,
):
    """`heads` heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads + tl.arange(0, heads)
    index = tl.arange(0, block)
    mask = (head < num_v_heads)[:, None] & (index < d_v)[None, :]
    place = head[:, None] * d_v + index[None, :]
    row = token * num_v_heads * d_v + place
    y = tl.load(o + row, mask=mask, other=0.0).to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, axis=1) / d_v + eps)[:, None]
    y *= tl.load(weight + index, mask=index < d_v, other=0.0).to(tl.float32)[None, :]
    if gate != "none":
        z = tl.load(projected + token * row_stride + column + place, mask=mask, other=0.0).to(tl.float32)
        y *= tl.sigmoid(z)
        if gate == "silu":
            y *= z
    tl.store(out + row, y.to(out.dtype.element_ty), mask=mask)
