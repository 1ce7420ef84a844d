"""What a block asks of its mixer, whatever its kind."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from modeling.ops import GatedDeltaRule
from modeling.state import LayerState

Tap = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Called in each linear layer as `tap(layer, x, q, k)` with the layer's index in the model, the mixer's input
`[tokens, hidden]` and the post-convolution, pre-normalisation q and k `[tokens, num_k_heads, d_k]`; what it returns is
used as q and k. Statistics observe through it, masks and gates act through it."""


class Mixer(nn.Module, ABC):
    """A token mixer: what moves information from token to token, and keeps a state to do so."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        cu_seqlens: Sequence[int],
        state: LayerState | None = None,
        *,
        rule: GatedDeltaRule | None = None,
        tap: Tap | None = None,
    ) -> tuple[Tensor, LayerState]:
        """Packed sequences.

        Args:
            x: `[tokens, hidden]`, all sequences one after the other.
            cu_seqlens: offsets, `[0, ..., tokens]`.
            state: a row for each sequence; None for the beginning.
            rule, tap: of linear attention only (`Model.forward`).

        Returns:
            Output like x, and the state after each sequence.
        """

    @abstractmethod
    def decode(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        """One token of each of B requests, x `[B, hidden]` -> output like x; the states at `slots` int64 `[B]`,
        distinct, move on in place."""
