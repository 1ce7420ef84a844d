"""What a block asks of its mixer, whatever its kind."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from modeling.state import LayerState, SequenceState


class Mixer(nn.Module, ABC):
    """A token mixer: what moves information from token to token, and keeps a state to do so."""

    @abstractmethod
    def forward(
        self, x: Tensor, cu_seqlens: Sequence[int], state: SequenceState | None = None
    ) -> tuple[Tensor, SequenceState]:
        """Packed sequences.

        Args:
            x: `[tokens, hidden]`, all sequences one after the other.
            cu_seqlens: offsets, `[0, ..., tokens]`.
            state: a row for each sequence; None for the beginning.

        Returns:
            Output like x, and the state after each sequence.
        """

    def prefill(self, x: Tensor, cu_seqlens: Sequence[int], state: LayerState, slots: Tensor) -> Tensor:
        """`forward` of sequences whose states are at `slots` int64 `[sequences]`, distinct, and move on there in place.

        The states are copied out and in again; a kind whose states are large has a better way of its own.
        """
        y, after = self(x, cu_seqlens, state.gather(slots))
        state.scatter(slots, after)
        return y  # type: ignore[no-any-return]

    @abstractmethod
    def decode(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        """One token of each of B requests, x `[B, hidden]` -> output like x; the states at `slots` int64 `[B]`,
        distinct, move on in place."""
