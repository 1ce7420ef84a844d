"""What every kind of mixer's state can do."""

from typing import Protocol, Self

from torch import Tensor


class LayerState(Protocol):
    """The states that one layer's mixer keeps, a row for each slot of a pool or for each packed sequence."""

    @property
    def bytes_per_row(self) -> int:
        """Bytes that a row really takes."""
        ...

    def zero(self, row: int) -> None:
        """Make a row the state before the first token."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copy one row over another."""
        ...

    def gather(self, rows: Tensor) -> Self:
        """A copy of `rows` int64 `[n]`, as the states of n packed sequences, all in float dtypes."""
        ...

    def scatter(self, rows: Tensor, state: Self) -> None:
        """Write the states of n packed sequences to `rows` int64 `[n]`, rounded to what rows are kept in."""
        ...

    def tensors(self, row: int) -> dict[str, Tensor]:
        """Views of a row by the names that they have in a file."""
        ...
