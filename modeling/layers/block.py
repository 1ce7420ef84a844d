"""A layer of the model: a mixer and a feed-forward, each of a kind, with their norms."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from modeling.layers.delta import DeltaMixer, Tap
from modeling.layers.mixer import Mixer
from modeling.layers.mlp import MLP
from modeling.layers.norms import RMSNorm
from modeling.ops import GatedDeltaRule
from modeling.spec import DeltaSpec, LayerSpec, MLPSpec
from modeling.state import LayerState

MIXERS: dict[type, Callable[..., Mixer]] = {DeltaSpec: DeltaMixer}
"""Kinds of mixers by the class of their spec. Each is made of (spec, hidden size, index of the layer)."""

FEED_FORWARDS: dict[type, type[nn.Module]] = {MLPSpec: MLP}
"""Kinds of feed-forwards by the class of their spec. Each is made of (spec, hidden size)."""


class Block(nn.Module):
    """Pre-norm block: x + mixer(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, spec: LayerSpec, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(hidden_size, spec.norm.eps)
        self.mixer = MIXERS[type(spec.mixer)](spec.mixer, hidden_size, layer)
        self.ffn_norm = RMSNorm(hidden_size, spec.norm.eps)
        self.ffn = FEED_FORWARDS[type(spec.ffn)](spec.ffn, hidden_size)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Sequence[int],
        state: LayerState | None = None,
        *,
        rule: GatedDeltaRule | None = None,
        tap: Tap | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Run packed sequences.

        Args:
            x: `[tokens, hidden]`.
            cu_seqlens: offsets of the sequences.
            state: the mixer's, a row for each sequence; None for the beginning.
            rule, tap: as `Model.forward`.

        Returns:
            Output like x, and the mixer's state after each sequence's last token.
        """
        linear = {"rule": rule, "tap": tap} if isinstance(self.mixer, DeltaMixer) else {}
        y, state = self.mixer(self.mixer_norm(x), cu_seqlens, state, **linear)
        x = x + y
        return x + self.ffn(self.ffn_norm(x)), state

    def prefill(self, x: Tensor, cu_seqlens: Sequence[int], state: LayerState, slots: Tensor) -> Tensor:
        """Packed sequences, x `[tokens, hidden]`, whose states are at `slots` `[sequences]` and move on there in
        place."""
        x = x + self.mixer.prefill(self.mixer_norm(x), cu_seqlens, state, slots)
        y: Tensor = self.ffn(self.ffn_norm(x))
        return x + y

    def decode(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        """One token of each of B requests: x `[B, hidden]`, output like it; `state` moves on in place at `slots`
        `[B]`."""
        x = x + self.mixer.decode(self.mixer_norm(x), state, slots)
        y: Tensor = self.ffn(self.ffn_norm(x))
        return x + y
