"""A layer, and the whole model."""

from dataclasses import dataclass, replace

from modeling.spec.delta import DeltaSpec
from modeling.spec.mixer import MixerSpec
from modeling.spec.mlp import MLPSpec
from modeling.spec.moe import MoESpec
from modeling.spec.tensors import FLOAT32_STATES, StateTypes

TOKEN_BLOCK = 64
"""Tokens of a prompt that are worked on together. Pieces of prompts begin at its multiples, prefixes are kept there,
and the gated delta rule takes as many at a time: so a prompt is cut at the same places whatever else runs, and its
states are the same bits."""


@dataclass(frozen=True)
class NormSpec:
    """RMSNorm over the hidden size, plain weight."""

    eps: float


@dataclass(frozen=True)
class LayerSpec:
    """One block of a mixer and a feed-forward, each of a kind: x + mixer(norm(x)), then x + ffn(norm(x))."""

    mixer: MixerSpec
    ffn: MLPSpec | MoESpec
    norm: NormSpec
    norm_after: bool = False
    """Whether the norms are of what comes out instead: x + norm(mixer(x)), then x + norm(ffn(x))."""


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. `context_length` is what the checkpoint was trained for; linear layers themselves have no
    limit. The first of `eos_token_ids` is the one that ends a document."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    tie_embeddings: bool
    context_length: int
    eos_token_ids: tuple[int, ...]

    @property
    def deltas(self) -> dict[int, DeltaSpec]:
        """The linear-attention mixers, which are what pruning reduces, by the index of their layer."""
        return {i: layer.mixer for i, layer in enumerate(self.layers) if isinstance(layer.mixer, DeltaSpec)}

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose mixer is linear attention."""
        return tuple(self.deltas)

    @property
    def d_k(self) -> tuple[int, ...]:
        """Key channels per head of each linear layer."""
        return tuple(mixer.d_k for mixer in self.deltas.values())

    @property
    def mean_d_k(self) -> float:
        return sum(self.d_k) / len(self.d_k)

    def with_d_k(self, d_k: tuple[int, ...]) -> "ModelSpec":
        """The same model with `d_k[i]` key channels per head in the i-th linear layer."""
        if len(d_k) != len(self.linear_layers):
            raise ValueError(f"d_k has {len(d_k)} entries for {len(self.linear_layers)} linear layers")
        layers = list(self.layers)
        for (i, mixer), n in zip(self.deltas.items(), d_k, strict=True):
            layers[i] = replace(layers[i], mixer=mixer.with_d_k(n))
        return replace(self, layers=tuple(layers))

    def kv_bytes_per_token(self, types: StateTypes = FLOAT32_STATES) -> int:
        """Bytes that a request's state grows by with each token: the keys and values of the softmax attention layers,
        0 for a model that has none."""
        return self.state_bytes(1, types) - self.state_bytes(0, types)

    def state_bytes(self, tokens: int, types: StateTypes = FLOAT32_STATES) -> int:
        """Bytes of state that one request of `tokens` tokens holds: those of all its mixers."""
        return sum(layer.mixer.state_bytes(tokens, types) for layer in self.layers)
