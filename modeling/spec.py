"""Model shapes: everything the code needs to know about a checkpoint, made once from its config.json.

The classes are frozen, hold no tensors and belong to no checkpoint family. Nothing here assumes that the layers
of a model share a shape: per-layer budgets give each layer its own `d_k`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch

GateActivation = Literal["none", "silu", "sigmoid"]


@dataclass(frozen=True)
class MixerSpec:
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

    def with_d_k(self, d_k: int) -> "MixerSpec":
        return replace(self, d_k=d_k)


@dataclass(frozen=True)
class MLPSpec:
    """SwiGLU feed-forward block: down(silu(gate(x)) * up(x))."""

    intermediate_size: int


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm over the hidden size, plain weight."""

    eps: float


@dataclass(frozen=True)
class LayerSpec:
    """One pre-norm block: x + mixer(norm(x)), then x + mlp(norm(x))."""

    mixer: MixerSpec
    mlp: MLPSpec
    norm: NormSpec


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. `context_length` is what the checkpoint was trained for; the state itself never grows."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    tie_embeddings: bool
    context_length: int
    eos_token_ids: tuple[int, ...]

    @property
    def d_k(self) -> tuple[int, ...]:
        """Key channels per head, per layer."""
        return tuple(layer.mixer.d_k for layer in self.layers)

    @property
    def mean_d_k(self) -> float:
        return sum(self.d_k) / len(self.layers)

    def with_d_k(self, d_k: tuple[int, ...]) -> "ModelSpec":
        """The same model with `d_k[i]` key channels per head in layer i."""
        if len(d_k) != len(self.layers):
            raise ValueError(f"d_k has {len(d_k)} entries for {len(self.layers)} layers")
        layers = tuple(
            replace(layer, mixer=layer.mixer.with_d_k(n)) for layer, n in zip(self.layers, d_k, strict=True)
        )
        return replace(self, layers=layers)

    def state_bytes(
        self,
        tokens: int = 0,
        *,
        state_dtype: torch.dtype = torch.float32,
        conv_dtype: torch.dtype = torch.float32,
    ) -> int:
        """Bytes of state that one request of `tokens` tokens holds.

        Linear-attention layers hold a fixed state (`num_v_heads x d_k x d_v` plus the last
        `conv_kernel - 1` inputs of the short convolution), so `tokens` does not matter to them.
        """
        total = 0
        for layer in self.layers:
            m = layer.mixer
            total += m.num_v_heads * m.d_k * m.d_v * state_dtype.itemsize
            total += m.conv_channels * (m.conv_kernel - 1) * conv_dtype.itemsize
        return total
