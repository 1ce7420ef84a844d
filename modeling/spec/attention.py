"""Softmax attention, as the hybrids have it in some of their layers."""

from dataclasses import dataclass
from typing import Literal

from modeling.spec.tensors import StateTypes

QkNorm = Literal["none", "head", "whole"]
"""What queries and keys are normalised over before the rotation: nothing, each head, or all heads together."""


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embeddings of the first `dims` channels of each head (arXiv 2104.09864), channel c paired with
    channel c + dims / 2. The other channels pass as they are."""

    dims: int
    theta: float

    def __post_init__(self) -> None:
        if self.dims < 2 or self.dims % 2:
            raise ValueError(f"rotary dims must be an even number of at least 2, got {self.dims}")


@dataclass(frozen=True)
class AttentionSpec:
    """One softmax attention mixer. Query head h reads key/value head `h // (num_heads // num_kv_heads)`."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Channels of a query, key or value head."""
    rope: RopeSpec | None
    """None: no positions at all (NoPE)."""
    qk_norm: QkNorm
    gated: bool
    """Whether the output is multiplied by the sigmoid of a gate, one for each of its channels, before the output
    projection."""
    norm_eps: float
    """Epsilon of the norms of queries and keys."""

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.rope is not None and self.rope.dims > self.head_dim:
            raise ValueError(f"rotary dims {self.rope.dims} are more than head_dim={self.head_dim}")

    @property
    def q_dim(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Channels of all key heads, and as many of all value heads."""
        return self.num_kv_heads * self.head_dim

    @property
    def in_proj_sizes(self) -> tuple[int, int, int, int]:
        """Rows of the fused input projection: q, k, v, and the output gate, 0 if there is none."""
        return self.q_dim, self.kv_dim, self.kv_dim, self.q_dim if self.gated else 0

    def state_bytes(self, tokens: int, types: StateTypes) -> int:
        """Bytes of the keys and values of a request of `tokens` tokens."""
        return tokens * 2 * self.kv_dim * types.inputs.itemsize
