"""Token-loop reference of the gated delta rule. Slow, exact in float64: the oracle for every other form of the rule."""

import itertools

import torch
from torch import Tensor

from modeling.ops.rule import RuleInputs


def wide(x: Tensor) -> Tensor:
    """float32, or float64 for float64 input: what recurrences, norms and gates are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def reference_step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """One token of each of B sequences.

    Args:
        state: `[B, num_v_heads, d_k, d_v]`; not modified.
        q, k: `[B, num_k_heads, d_k]`, L2-normalised.
        v: `[B, num_v_heads, d_v]`.
        g: log decay `[B, num_v_heads]` or None.
        beta: `[B, num_v_heads]`.
        scale: factor on q.

    Returns:
        o `[B, num_v_heads, d_v]` and the new state.
    """
    groups = v.shape[1] // k.shape[1]
    q = q.repeat_interleave(groups, dim=1) * scale
    k = k.repeat_interleave(groups, dim=1)
    if g is not None:
        state = state * g.exp()[..., None, None]
    u = beta[..., None] * (v - torch.einsum("bhkv,bhk->bhv", state, k))
    state = state + k[..., None] * u[..., None, :]
    return torch.einsum("bhkv,bhk->bhv", state, q), state


def reference_gated_delta_rule(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """`modeling.ops.GatedDeltaRule`, one token at a time."""
    q, k, v, beta = wide(inputs.q), wide(inputs.k), wide(inputs.v), wide(inputs.beta)
    g = None if inputs.g is None else wide(inputs.g)
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    for i, (start, end) in enumerate(itertools.pairwise(inputs.cu_seqlens)):
        if inputs.initial_state is None:
            state = v.new_zeros(1, v.shape[1], k.shape[2], v.shape[2])
        else:
            state = wide(inputs.initial_state[i : i + 1])
        for t in range(start, end):
            at = slice(t, t + 1)
            o, state = reference_step(
                state, q[at], k[at], v[at], None if g is None else g[at], beta[at], scale=inputs.scale
            )
            outputs.append(o)
        finals.append(state)
    return torch.cat(outputs), torch.cat(finals)
