"""The dense feed-forward."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MLPSpec:
    """SwiGLU feed-forward block: down(silu(gate(x)) * up(x))."""

    intermediate_size: int
