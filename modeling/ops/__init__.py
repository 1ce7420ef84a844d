"""The gated delta rule behind one small interface.

Every back end computes, per value head and token, in float32 or wider (arXiv 2412.06464, eq. 10):

    S = exp(g) * S;  u = beta * (v - S^T k);  S = S + k u^T;  o = S^T (q * scale)

over packed sequences: sequence i owns tokens `cu_seqlens[i]` to `cu_seqlens[i + 1]`. The state S is K-first,
`[num_v_heads, d_k, d_v]`.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from modeling.ops.chunked import chunked_gated_delta_rule
from modeling.ops.reference import reference_gated_delta_rule, reference_step, wide

__all__ = [
    "GatedDeltaRule",
    "UnavailableError",
    "chunked_gated_delta_rule",
    "reference_gated_delta_rule",
    "reference_step",
    "wide",
]


class UnavailableError(Exception):
    """A back end can't be had here. The message says why, and what would help."""


class GatedDeltaRule(Protocol):
    """One back end of the sequence form.

    Args:
        q, k: `[tokens, num_k_heads, d_k]`, L2-normalised over d_k.
        v: `[tokens, num_v_heads, d_v]`.
        g: log decay, `[tokens, num_v_heads]`, or None for decay 1.
        beta: `[tokens, num_v_heads]`.
        scale: factor on q.
        cu_seqlens: offsets of the packed sequences, from 0 to the number of tokens; no sequence is empty.
        initial_state: `[sequences, num_v_heads, d_k, d_v]`, or None for zeros.

    Returns:
        o `[tokens, num_v_heads, d_v]` and the final state `[sequences, num_v_heads, d_k, d_v]`, both in float32
        (float64 where the inputs are).
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor | None,
        beta: Tensor,
        *,
        scale: float,
        cu_seqlens: Sequence[int],
        initial_state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...
