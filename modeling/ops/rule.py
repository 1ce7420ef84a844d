"""What a gated delta rule reads and gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RuleInputs:
    """What the gated delta rule reads, of packed sequences."""

    q: Tensor
    """Queries `[tokens, num_k_heads, d_k]`, L2-normalised over d_k."""
    k: Tensor
    """Keys `[tokens, num_k_heads, d_k]`, L2-normalised over d_k."""
    v: Tensor
    """Values `[tokens, num_v_heads, d_v]`."""
    g: Tensor | None
    """Log decay `[tokens, num_v_heads]`, or None for decay 1."""
    beta: Tensor
    """Step size `[tokens, num_v_heads]`."""
    scale: float
    """Factor on q."""
    cu_seqlens: Sequence[int]
    """Offsets of the packed sequences, from 0 to the number of tokens; no sequence is empty."""
    initial_state: Tensor | None = None
    """State before each sequence `[sequences, num_v_heads, d_k, d_v]`, or None for zeros."""


GatedDeltaRule = Callable[[RuleInputs], tuple[Tensor, Tensor]]
"""Gives o `[tokens, num_v_heads, d_v]` and the state after each sequence `[sequences, num_v_heads, d_k, d_v]`, in
float32 (float64 where the inputs are); o may be in v's dtype."""
