"""What a runtime offers to an engine."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from modeling.model import Model
from modeling.spec import StateTypes
from modeling.state import StatePool


class UnavailableError(Exception):
    """A runtime can't be had here. The message says why, and what would help."""


class Runtime(Protocol):
    """Computes one model, whose parameters stay as they are from now on, without gradients."""

    @property
    def name(self) -> str:
        """What users read in logs and metrics: "cpu", "triton" or "torch"."""
        ...

    @property
    def model(self) -> Model:
        """The model that it computes."""
        ...

    def prefill(self, input_ids: Tensor, cu_seqlens: Sequence[int], pool: StatePool, slots: Tensor) -> Tensor:
        """Packed sequences whose states are in the pool, and move on there.

        Args:
            input_ids: int64 `[tokens]`, all sequences one after the other.
            cu_seqlens: offsets, `[0, ..., tokens]`; no sequence is empty.
            pool: holds the states, updated in place.
            slots: int64 `[sequences]`, distinct.

        Returns:
            Hidden states after the final norm, `[tokens, hidden]`.
        """
        ...

    def decode(self, input_ids: Tensor, pool: StatePool, slots: Tensor) -> Tensor:
        """One token of each of B requests; their states in the pool move on by that token.

        Args:
            input_ids: int64 `[B]`.
            pool: holds the states, updated in place.
            slots: int64 `[B]`, distinct.

        Returns:
            Hidden states after the final norm, `[B, hidden]`.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, hidden]` -> `[n, vocab]`, in the parameters' dtype or float32."""
        ...

    def check_states(self, types: StateTypes) -> None:
        """Raises UnavailableError where it has nothing that computes states of these types."""
        ...

    @property
    def recordable(self) -> bool:
        """Whether a decode step can be recorded and replayed (`modeling.runtime.gpu.graphs`): it does the same for
        every batch of a size and never waits for the device."""
        ...

    @property
    def independent_rows(self) -> bool:
        """Whether what a decode step makes of a request depends on how many requests there are, but on nothing of the
        others: always the same bits beside as many."""
        ...

    def compile_ahead(self, work: Callable[[], object]) -> None:
        """Have ready what `work`, calls of this runtime, would be held up by: kernels that are compiled when they are
        first launched. `work` may run in the course of it, and what it then computes means nothing."""
        ...
