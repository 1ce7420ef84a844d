"""The mixture of experts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class MoESpec:
    """SwiGLU experts, of which each token takes the `top_k` that the router likes best, beside one that all take.

    The router's softmax is over all experts; the weights of those taken are made to add up to 1.
    """

    num_experts: int
    top_k: int
    expert_size: int
    """Intermediate channels of each expert."""
    shared_size: int
    """Intermediate channels of the expert that all tokens take, multiplied by the sigmoid of a gate of its own."""

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k} must be between 1 and num_experts={self.num_experts}")

    @property
    def active_size(self) -> int:
        """Intermediate channels that one token passes through."""
        return self.top_k * self.expert_size + self.shared_size
