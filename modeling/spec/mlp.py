"""The dense feed-forward."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MLPSpec:
    """SwiGLU feed-forward block: down(silu(gate(x)) * up(x))."""

    intermediate_size: int

    @property
    def active_size(self) -> int:
        """Intermediate channels that one token passes through."""
        return self.intermediate_size
