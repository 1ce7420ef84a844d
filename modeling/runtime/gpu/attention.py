"""Softmax attention over pages of keys and values by Triton kernels, for a decode step and for prompts.

Between a mixer's two projections there are two launches, or three: one normalises and rotates queries and keys and
writes keys and values to the pages, one attends, and in a decode step in which the tokens of a request may be split
among programs, since requests are few or can be very long, one joins the splits.

A decode step is bound by memory: it reads the keys and values of all tokens once, `2 * kv_dim` numbers a token and
layer.
"""

from collections.abc import Sequence
from functools import cache
from math import gcd

import torch
from torch import Tensor

from modeling.device import upload
from modeling.layers import AttentionMixer, RMSNorm
from modeling.ops import GatedDeltaRule
from modeling.runtime.gpu.kernels.attention import attend_packed, prepare_heads
from modeling.runtime.gpu.kernels.attention_step import attend_step, join_splits
from modeling.runtime.gpu.packing import Packing, packing
from modeling.runtime.gpu.products import product
from modeling.runtime.gpu.sizes import power_of_2
from modeling.spec import TOKEN_BLOCK, RopeSpec
from modeling.state import PAGE_TOKENS, PagedKV

MOST_HEAD_DIM = 256
"""Channels of a head, at most: more do not fit the shared memory of a multiprocessor."""
PROGRAMS = 264
"""Programs of a decode step, at most, where tokens are split: two for each of an H100's 132 multiprocessors. More have
more to join."""
MOST_SPLITS = 128
"""Splits of a request's tokens, at most."""
WHOLE_TOKENS = 4096
"""Tokens of a split, at most, before its request is one to be cut into more: a step would wait for the few programs
that read it."""
PIECE_TOKENS = 1024
"""Tokens of a split of such a request, at least."""
MOST_LONG_SPLITS = 64
"""Splits of such a request, at most."""
LONG_PROGRAMS = 528
"""Programs that look for such splits, at most: four for each of an H100's multiprocessors, as many as run at a time.
Where all requests are long, they do most of the work."""
MOST_PARTS = 4096
"""Splits that there is memory for, in all requests of a batch: in float32, 64 MiB for 16 heads of 256 channels."""
RAGGED_REGISTERS = 128
"""Registers of a thread of a step that may meet long requests: as many as it has in other steps, so that a
multiprocessor runs as many programs at a time. What is too much for them waits in memory, but for within the loops
over blocks."""
JOINS = {8: (256, 4), 16: (256, 4), MOST_LONG_SPLITS: (256, 8), MOST_SPLITS: (64, 4)}
"""Up to so many splits are joined by programs of so many channels, and so many warps."""
STEP_BYTES = 16384
"""Bytes of keys that a program of a decode step reads at a time, at most."""
STEP_WARPS = 4
"""Warps of a program of a decode step."""
STEP_STAGES = 2
"""Stages of a step's loop over blocks where tokens are not split: there are programs enough to have blocks on their
way (measured, docs/gpu.md)."""
SPLIT_STAGES = 3
"""Stages of that loop where tokens are split."""
PACKED_TILES = {2: (64, 2, 32768), 4: (16, 1, 16384)}
"""Query tokens of a program of prompts, its query heads, at most, and the bytes of keys that it reads at a time, at
most; by the bytes of an element. What tensor cores do not multiply must be small, or it does not fit the registers."""
PACKED_ROWS_PER_WARP = 16
"""Pairs of a query token and a head that a warp of such a program takes."""
PACKED_STAGES = 2
"""Stages of its loop over blocks."""
PREPARED_PER_WARP = 1024
"""Elements of queries or keys that a warp of `prepare_heads` holds."""
LOG2_E = 1.4426950408889634
"""The logarithm of e to base 2: kernels take powers of 2."""


def attention_step(mixer: AttentionMixer, projected: Tensor, state: PagedKV, slots: Tensor) -> Tensor:
    """Softmax attention of a decode step, as the output projection takes it.

    Slots that occur more than once get keys, values and outputs of no meaning (`DecodeGraphs`' null slot), nobody
    else's do.

    Args:
        projected: rows `q | k | v | gate` of one token of each of B requests, `[B, sum(in_proj_sizes)]`.
        state: keys and values of the layer, which get the new ones; `state.pages.lengths` stay as they are.
        slots: int64 `[B]`.

    Returns:
        `[B, q_dim]` in projected's dtype.

    Raises:
        ValueError: float64 tensors, whose precision the kernels would silently lose.
    """
    s = mixer.spec
    q = prepared(mixer, projected, state, slots, None)
    batch = len(projected)
    splits, most_splits = splits_of(batch, s.num_kv_heads, state.pages.blocks.shape[1] * PAGE_TOKENS)
    ragged = most_splits > splits
    others = min(max(LONG_PROGRAMS // s.num_kv_heads, 1), batch * (most_splits - splits))
    parts, sizes = None, None
    if most_splits > 1:
        parts = q.new_empty(batch, s.num_heads, most_splits, s.head_dim, dtype=torch.float32)
        sizes = parts.new_empty(batch, s.num_heads, most_splits)
    block_d = padded(s.head_dim)
    block = block_of(STEP_BYTES, block_d, q, state.keys)
    gate_column = sum(s.in_proj_sizes[:3])
    attend_step[(s.num_kv_heads, batch * splits + others)](
        q,
        projected,
        state.keys,
        state.values,
        state.pages.blocks,
        state.pages.lengths,
        slots,
        parts,
        sizes,
        projected.stride(0),
        gate_column,
        state.pages.blocks.shape[1],
        batch,
        splits,
        most_splits,
        others,
        s.head_dim**-0.5 * LOG2_E,
        num_heads=s.num_heads,
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        gated=s.gated,
        divided=splits > 1,
        ragged=ragged,
        page_tokens=PAGE_TOKENS,
        block=block,
        whole=WHOLE_TOKENS // block,
        piece=PIECE_TOKENS // block,
        rows=padded(s.num_heads // s.num_kv_heads),
        block_d=block_d,
        num_warps=STEP_WARPS,
        num_stages=SPLIT_STAGES if splits > 1 else STEP_STAGES,
        maxnreg=RAGGED_REGISTERS if ragged else None,
    )
    if most_splits > 1:
        joined = next(n for n in JOINS if most_splits <= n)
        columns, warps = JOINS[joined]
        columns = min(block_d, columns)
        join_splits[(batch, s.num_heads, block_d // columns)](
            q,
            projected,
            state.pages.lengths,
            slots,
            parts,
            sizes,
            projected.stride(0),
            gate_column,
            splits,
            most_splits,
            num_heads=s.num_heads,
            head_dim=s.head_dim,
            gated=s.gated,
            block=block,
            whole=WHOLE_TOKENS // block,
            piece=PIECE_TOKENS // block,
            padded_splits=joined,
            columns=columns,
            num_warps=warps,
        )
    return q.flatten(1)


def attention_prompts(
    mixer: AttentionMixer, projected: Tensor, cu_seqlens: Sequence[int], state: PagedKV, slots: Tensor
) -> Tensor:
    """Softmax attention of packed prompts that go on from what is in the pages, as the output projection takes it.

    Args:
        projected: rows `q | k | v | gate`, `[tokens, sum(in_proj_sizes)]`.
        cu_seqlens: offsets of the packed sequences.
        state: keys and values of the layer, which get the new ones; `state.pages.lengths` stay as they are.
        slots: int64 `[sequences]`.

    Returns:
        `[tokens, q_dim]` in projected's dtype.

    Raises:
        ValueError: float64 tensors, whose precision the kernels would silently lose.
    """
    s = mixer.spec
    packed = packing(cu_seqlens, projected.device)
    q = prepared(mixer, projected, state, slots, packed)
    queries, most_heads, most_bytes = PACKED_TILES[q.element_size()]
    heads = gcd(s.num_heads // s.num_kv_heads, most_heads)
    block_d = padded(s.head_dim)
    attend_packed[(s.num_heads // heads, len(packed.chunks) * (TOKEN_BLOCK // queries))](
        q,
        projected,
        state.keys,
        state.values,
        state.pages.blocks,
        state.pages.lengths,
        slots,
        packed.offsets,
        packed.chunks,
        projected.stride(0),
        sum(s.in_proj_sizes[:3]),
        state.pages.blocks.shape[1],
        s.head_dim**-0.5 * LOG2_E,
        num_heads=s.num_heads,
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        gated=s.gated,
        page_tokens=PAGE_TOKENS,
        chunk=TOKEN_BLOCK,
        queries=queries,
        heads=heads,
        block=block_of(most_bytes, block_d, q, state.keys),
        block_d=block_d,
        num_warps=max(queries * heads // PACKED_ROWS_PER_WARP, 4),
        num_stages=PACKED_STAGES,
    )
    return q.flatten(1)


def prepared(
    mixer: AttentionMixer, projected: Tensor, state: PagedKV, slots: Tensor, packed: Packing | None
) -> Tensor:
    """Queries `[tokens, num_heads, head_dim]`, normalised and rotated, in projected's dtype. Keys, likewise, and values
    go to the pages. Without a packing each row is a sequence."""
    if torch.float64 in (projected.dtype, state.keys.dtype):
        raise ValueError("the Triton attention computes in float32; for float64 use the torch runtime")
    s = mixer.spec
    q = projected.new_empty(len(projected), s.num_heads, s.head_dim)
    programs = len(projected) if packed is None else len(packed.chunks) * TOKEN_BLOCK
    block_q, block_kv, block_d = power_of_2(s.num_heads), power_of_2(s.num_kv_heads), padded(s.head_dim)
    q_norm, k_norm = (None, None) if s.qk_norm == "none" else (mixer.q_norm, mixer.k_norm)
    prepare_heads[(programs, 2)](
        projected,
        q,
        state.keys,
        state.values,
        state.pages.blocks,
        state.pages.lengths,
        slots,
        None if packed is None else packed.offsets,
        None if packed is None else packed.chunks,
        None if q_norm is None else q_norm.weight,
        None if k_norm is None else k_norm.weight,
        None if s.rope is None else frequencies(s.rope, projected.device),
        projected.stride(0),
        state.pages.blocks.shape[1],
        s.norm_eps,
        num_heads=s.num_heads,
        num_kv_heads=s.num_kv_heads,
        head_dim=s.head_dim,
        qk_norm=s.qk_norm,
        rope_dims=0 if s.rope is None else s.rope.dims,
        page_tokens=PAGE_TOKENS,
        chunk=TOKEN_BLOCK,
        block_q=block_q,
        block_kv=block_kv,
        block_d=block_d,
        num_warps=min(max(block_q * block_d // PREPARED_PER_WARP, 1), 8),
    )
    return q


def add_attention_prefill(
    mixer: AttentionMixer,
    x: Tensor,
    norm: RMSNorm | None,
    residual: Tensor | None,
    cu_seqlens: Sequence[int],
    state: PagedKV,
    slots: Tensor,
    rule: GatedDeltaRule,
) -> Tensor:
    """residual plus `AttentionMixer.prefill` of norm(x), both `[tokens, hidden]` (`runtime.MIXERS`)."""
    projected = product(x, mixer.in_proj.weight, norm)
    return product(
        attention_prompts(mixer, projected, cu_seqlens, state, slots), mixer.o_proj.weight, residual=residual
    )


def add_attention(
    mixer: AttentionMixer,
    x: Tensor,
    norm: RMSNorm | None,
    residual: Tensor | None,
    state: PagedKV,
    slots: Tensor,
) -> Tensor:
    """residual plus the mixer's decode step of norm(x), both `[B, hidden]` (`runtime.MIXERS`)."""
    projected = product(x, mixer.in_proj.weight, norm)
    return product(attention_step(mixer, projected, state, slots), mixer.o_proj.weight, residual=residual)


def splits_of(batch: int, kv_heads: int, longest: int) -> tuple[int, int]:
    """How many parts the tokens of a request are split into in a decode step: of every request, and of a very long one
    at most (`share_of`). The lengths are on the device, and a row's result must not depend on the others': both are by
    the batch's size alone, and by the most tokens that a slot may have."""
    splits = min(max(PROGRAMS // (batch * kv_heads), 1), MOST_SPLITS)
    most_splits = min(MOST_LONG_SPLITS, MOST_PARTS // batch)
    return splits, most_splits if longest > splits * WHOLE_TOKENS and most_splits > splits else splits


def block_of(most_bytes: int, block_d: int, q: Tensor, keys: Tensor) -> int:
    """Tokens whose keys a program reads at a time."""
    size = max(q.element_size(), keys.element_size())
    return min(max(most_bytes // (block_d * size), 16), PAGE_TOKENS)


def padded(size: int) -> int:
    """A side of a matrix that tensor cores take."""
    return max(power_of_2(size), 16)


@cache
def frequencies(rope: RopeSpec, device: torch.device) -> Tensor:
    """Radians that each pair of channels turns by with each token, float32 `[dims / 2]`. They stay, since recorded
    steps read them where they are."""
    half = rope.dims // 2
    with torch.inference_mode(False):
        return upload(rope.theta ** -(torch.arange(half, dtype=torch.float32) / half), device)
