"""A layer of the model: a mixer and a feed-forward, each of a kind, with their norms."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from modeling.layers.attention import AttentionMixer
from modeling.layers.delta import DeltaMixer, Tap
from modeling.layers.mixer import Mixer
from modeling.layers.mlp import MLP
from modeling.layers.moe import MoE
from modeling.layers.norms import RMSNorm
from modeling.ops import GatedDeltaRule
from modeling.spec import AttentionSpec, DeltaSpec, LayerSpec, MLPSpec, MoESpec
from modeling.state import LayerState, SequenceState

MIXERS: dict[type, Callable[..., Mixer]] = {DeltaSpec: DeltaMixer, AttentionSpec: AttentionMixer}
"""Kinds of mixers by the class of their spec. Each is made of (spec, hidden size, index of the layer)."""

FEED_FORWARDS: dict[type, type[nn.Module]] = {MLPSpec: MLP, MoESpec: MoE}
"""Kinds of feed-forwards by the class of their spec. Each is made of (spec, hidden size)."""


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)); or, where `LayerSpec.norm_after` says so, x + norm(mixer(x)), then
    x + norm(ffn(x))."""

    def __init__(self, spec: LayerSpec, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.norm_after = spec.norm_after
        self.mixer_norm = RMSNorm(hidden_size, spec.norm.eps)
        self.mixer = MIXERS[type(spec.mixer)](spec.mixer, hidden_size, layer)
        self.ffn_norm = RMSNorm(hidden_size, spec.norm.eps)
        self.ffn = FEED_FORWARDS[type(spec.ffn)](spec.ffn, hidden_size)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Sequence[int],
        state: SequenceState | None = None,
        *,
        rule: GatedDeltaRule | None = None,
        tap: Tap | None = None,
    ) -> tuple[Tensor, SequenceState]:
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
        y, state = self.mixer(self._before(self.mixer_norm, x), cu_seqlens, state, **linear)
        return self._feed_forward(x + self._after(self.mixer_norm, y)), state

    def prefill(self, x: Tensor, cu_seqlens: Sequence[int], state: LayerState, slots: Tensor) -> Tensor:
        """Packed sequences, x `[tokens, hidden]`, whose states are at `slots` `[sequences]` and move on there in
        place."""
        y = self.mixer.prefill(self._before(self.mixer_norm, x), cu_seqlens, state, slots)
        return self._feed_forward(x + self._after(self.mixer_norm, y))

    def decode(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        """One token of each of B requests: x `[B, hidden]`, output like it; `state` moves on in place at `slots`
        `[B]`."""
        y = self.mixer.decode(self._before(self.mixer_norm, x), state, slots)
        return self._feed_forward(x + self._after(self.mixer_norm, y))

    def _feed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ffn(self._before(self.ffn_norm, x))
        return x + self._after(self.ffn_norm, y)

    def _before(self, norm: RMSNorm, x: Tensor) -> Tensor:
        """What goes into a mixer or feed-forward."""
        return x if self.norm_after else norm(x)

    def _after(self, norm: RMSNorm, y: Tensor) -> Tensor:
        """What is added to the residual."""
        return norm(y) if self.norm_after else y
