"""The (gated) delta rule mixer: DeltaNet, Gated DeltaNet."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

from modeling.spec.tensors import StateTypes, TensorSpec

GateActivation = Literal["none", "silu", "sigmoid"]


@dataclass(frozen=True)
class DeltaSpec:
    """One (gated) delta rule token mixer.

    Value head h reads key head `h // (num_v_heads // num_k_heads)`.
    """

    num_k_heads: int
    num_v_heads: int
    d_k: int
    d_v: int
    conv_kernel: int
    conv_bias: bool
    has_decay: bool
    """Gated DeltaNet: one scalar decay per value head and token. DeltaNet: none (decay 1)."""
    has_beta: bool
    """False: beta is 1 for every token."""
    beta_scale: float
    """2.0 where the checkpoint allows negative eigenvalues, else 1.0."""
    gate: GateActivation
    """Activation of the output gate, "none" for a plain output RMSNorm."""
    norm_eps: float
    """Epsilon of the output RMSNorm over d_v."""

    def __post_init__(self) -> None:
        for name in ("num_k_heads", "num_v_heads", "d_k", "d_v", "conv_kernel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_v_heads % self.num_k_heads:
            raise ValueError(
                f"num_v_heads={self.num_v_heads} must be a multiple of num_k_heads={self.num_k_heads}"
            )

    @property
    def key_dim(self) -> int:
        return self.num_k_heads * self.d_k

    @property
    def value_dim(self) -> int:
        return self.num_v_heads * self.d_v

    @property
    def conv_channels(self) -> int:
        """Channels of the short convolution: q, k and v side by side."""
        return 2 * self.key_dim + self.value_dim

    @property
    def in_proj_sizes(self) -> tuple[int, int, int, int]:
        """Rows of the fused input projection: (q|k|v, output gate, beta, decay); 0 for a part that is absent."""
        return (
            self.conv_channels,
            self.value_dim if self.gate != "none" else 0,
            self.num_v_heads if self.has_beta else 0,
            self.num_v_heads if self.has_decay else 0,
        )

    def with_d_k(self, d_k: int) -> "DeltaSpec":
        return replace(self, d_k=d_k)

    def state_tensors(self, types: StateTypes) -> dict[str, TensorSpec]:
        """The tensors of one request's state, by name.

        They are the recurrent state, K-first, and the last `conv_kernel - 1` inputs of the short convolution; beside a
        recurrent state in int8 also a scale for each value channel. No size depends on the number of tokens.
        """
        tensors = {
            "recurrent": TensorSpec((self.num_v_heads, self.d_k, self.d_v), types.recurrent),
            "conv": TensorSpec((self.conv_channels, self.conv_kernel - 1), types.inputs),
        }
        if types.recurrent == torch.int8:
            tensors["scales"] = TensorSpec((self.num_v_heads, self.d_v), torch.float32)
        return tensors

    def state_bytes(self, tokens: int, types: StateTypes) -> int:
        """Bytes of the state of a request of `tokens` tokens."""
        return sum(tensor.nbytes for tensor in self.state_tensors(types).values())
