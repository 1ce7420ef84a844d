"""Chunked gated delta rule in plain torch: any device, differentiable.

Within a chunk of C tokens the recurrence is the solution of one unit lower-triangular system (the WY form of
arXiv 2406.06484, section 3.2, with the decay of arXiv 2412.06464, section 3.3); between chunks only the state
is carried. Work per chunk is matrix products, so a prompt costs `tokens / C` sequential steps instead of `tokens`.
"""

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from modeling.ops.rule import RuleInputs
from modeling.spec import TOKEN_BLOCK


@dataclass(frozen=True)
class _Layout:
    """How packed sequences are cut into chunks.

    Sequences are taken longest first, and chunks are laid out step-major (the first chunk of every sequence, then
    the second of every sequence that has one ...), so that the sequences still running at a step are a prefix.
    """

    active: list[int]
    """Number of sequences that have a chunk at step i."""
    order: Tensor
    """The index of each sequence in the batch, the longest first."""
    rank: Tensor
    """The inverse of `order`: the place of each sequence in it."""
    rows: Tensor
    """For every padded chunk position its packed token, or the number of tokens for padding."""
    positions: Tensor
    """For every packed token its padded chunk position."""


@lru_cache(maxsize=64)
def _layout(lengths: tuple[int, ...], device: torch.device) -> _Layout:
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    steps = -(-max(lengths) // TOKEN_BLOCK)
    active: list[int] = []
    rows: list[int] = []
    for step in range(steps):
        running = [i for i in order if lengths[i] > step * TOKEN_BLOCK]
        active.append(len(running))
        for i in running:
            first = starts[i] + step * TOKEN_BLOCK
            end = min(first + TOKEN_BLOCK, starts[i + 1])
            rows.extend(range(first, end))
            rows.extend([starts[-1]] * (TOKEN_BLOCK - (end - first)))
    # Kept from call to call, so they must not be inference tensors, which autograd refuses.
    with torch.inference_mode(False):
        ranks, index = torch.tensor(order), torch.tensor(rows)
        positions = torch.empty(starts[-1] + 1, dtype=torch.long)
        positions[index] = torch.arange(len(rows))
        tensors = (ranks, ranks.argsort(), index, positions[:-1])
        return _Layout(active, *(t.to(device) for t in tensors))


def chunked_gated_delta_rule(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """`modeling.ops.GatedDeltaRule`, `TOKEN_BLOCK` tokens at a time; float32 products even under autocast."""
    with torch.autocast(inputs.v.device.type, enabled=False):
        return _chunked(inputs)


def _chunked(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    q, k, v, g, beta = inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta
    tokens, num_v_heads, d_v = v.shape
    num_k_heads, d_k = k.shape[1:]
    groups = num_v_heads // num_k_heads
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    lengths = tuple(b - a for a, b in itertools.pairwise(inputs.cu_seqlens))
    layout = _layout(lengths, v.device)
    active = layout.active
    padded = len(layout.rows) != tokens

    def to_chunks(x: Tensor, heads: int) -> Tensor:
        """`[tokens, heads, d]` -> `[chunks, heads, TOKEN_BLOCK, d]`, padding rows zero."""
        x = x.to(dtype)
        if padded:
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
        return x.index_select(0, layout.rows).view(-1, TOKEN_BLOCK, heads, x.shape[-1]).transpose(1, 2)

    def to_value_heads(x: Tensor) -> Tensor:
        return x if groups == 1 else x.repeat_interleave(groups, dim=1)

    # A padding row has k = v = beta = 0 and g = 0: it reads nothing, writes nothing, decays nothing.
    qc, kc = to_chunks(q * inputs.scale, num_k_heads), to_chunks(k, num_k_heads)
    vc, bc = to_chunks(v, num_v_heads), to_chunks(beta[..., None], num_v_heads)
    kk = to_value_heads(kc @ kc.transpose(-1, -2))
    qk = to_value_heads(qc @ kc.transpose(-1, -2))
    qc, kc = to_value_heads(qc), to_value_heads(kc)
    lower = torch.ones(TOKEN_BLOCK, TOKEN_BLOCK, dtype=torch.bool, device=v.device).tril()
    if g is None:
        ratio = lower.to(dtype)
        k_in = kc
    else:
        gc = to_chunks(g[..., None], num_v_heads).squeeze(-1).cumsum(-1)
        # Mask before exp: above the diagonal the exponent is positive and may overflow.
        ratio = (gc[..., :, None] - gc[..., None, :]).masked_fill(~lower, float("-inf")).exp()
        k_in = kc * gc.exp()[..., None]
        qc = qc * gc.exp()[..., None]
        kc = kc * (gc[..., -1:] - gc).exp()[..., None]
        chunk_decay = gc[..., -1].exp()[..., None, None]
    # (I + tril(beta k k^T, -1)) [u | w] = [beta v | beta k]; the diagonal is taken as ones by `unitriangular`.
    solved = torch.linalg.solve_triangular(
        kk * bc * ratio, torch.cat([vc, k_in], dim=-1) * bc, upper=False, unitriangular=True
    )
    u, w = solved.split([d_v, d_k], dim=-1)
    qk = qk * ratio

    if inputs.initial_state is None:
        state = v.new_zeros(len(lengths), num_v_heads, d_k, d_v, dtype=dtype)
    else:
        state = inputs.initial_state.to(dtype)[layout.order]
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    # split, not slices: the backward of a slice writes a zero tensor of the whole size.
    steps = [x.split(active) for x in (u, w, qc, kc, qk)]
    decays = None if g is None else chunk_decay.split(active)
    for i, running in enumerate(active):
        if running < state.shape[0]:
            finals.append(state[running:])
            state = state[:running]
        u_i, w_i, q_i, k_i, qk_i = (x[i] for x in steps)
        delta = u_i - w_i @ state
        outputs.append(q_i @ state + qk_i @ delta)
        if decays is not None:
            state = state * decays[i]
        state = state + k_i.transpose(-1, -2) @ delta
    finals.append(state)

    o = torch.cat(outputs).transpose(1, 2).reshape(-1, num_v_heads, d_v)
    final_state = torch.cat(finals[::-1]).index_select(0, layout.rank)
    return o.index_select(0, layout.positions), final_state
