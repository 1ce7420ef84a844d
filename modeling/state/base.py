"""What every kind of mixer's state is and can do."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class SequenceState(Protocol):
    """What one layer's mixer keeps of packed sequences. Only mixers of its kind look into it."""


class LayerState(Protocol):
    """The states that one layer's mixer keeps in a pool, a row for each slot."""

    @property
    def bytes_per_row(self) -> int:
        """Bytes that a row takes by itself, without pages."""
        ...

    def zero(self, row: int) -> None:
        """Make a row the state before the first token."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy one row over another."""
        ...

    def gather(self, rows: Tensor) -> Any:
        """A copy of `rows` int64 `[n]`, as the states of n packed sequences that the mixer's forward takes, all in
        float dtypes."""
        ...

    def scatter(self, rows: Tensor, state: Any) -> None:
        """Write the states of n packed sequences to `rows` int64 `[n]`, rounded to what rows are kept in."""
        ...

    def tensors(self, row: int, tokens: int) -> dict[str, Tensor]:
        """A row's state of so many tokens by the names that its tensors have in a file: where they lie, or copies."""
        ...

    def to_host(self, row: int, tokens: int) -> dict[str, Tensor]:
        """Copies of `tensors` on the host; from a GPU they are only queued, in pinned memory. Raises MemoryError."""
        ...

    def load(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        """Make a row the state of `tensors`, on the host, as `Self.tensors` names them; on a GPU behind all work that
        the device has been given, which may be the very copies to the host that fill them. It may be called in any
        thread. Raises MemoryError."""
        ...
