"""The state of a (gated) delta rule mixer, of fixed size: it never grows with the tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.huge_pages import zeros
from modeling.spec import DeltaSpec, StateTypes


@dataclass(frozen=True)
class DeltaState:
    """`modeling.state.LayerState` of a delta rule mixer.

    `recurrent` is `[rows, num_v_heads, d_k, d_v]`, K-first, and `conv`, the last inputs of the short convolution, is
    `[rows, conv_channels, conv_kernel - 1]`.
    """

    recurrent: Tensor
    conv: Tensor

    @classmethod
    def zeros(cls, spec: DeltaSpec, rows: int, types: StateTypes, device: torch.device | str) -> "DeltaState":
        """States before the first token."""
        made = {
            name: zeros([rows, *tensor.shape], tensor.dtype, device)
            for name, tensor in spec.state_tensors(types).items()
        }
        return cls(**made)

    @property
    def _all(self) -> tuple[Tensor, Tensor]:
        return self.recurrent, self.conv

    @property
    def bytes_per_row(self) -> int:
        return sum(t[0].nbytes for t in self._all)

    def zero(self, row: int) -> None:
        for t in self._all:
            t[row].zero_()

    def copy(self, source: int, target: int) -> None:
        for t in self._all:
            t[target].copy_(t[source])

    def gather(self, rows: Tensor) -> "DeltaState":
        return DeltaState(self.recurrent[rows], self.conv[rows])

    def scatter(self, rows: Tensor, state: "DeltaState") -> None:
        for t, new in zip(self._all, state._all, strict=True):
            t[rows] = new.to(t.dtype)

    def tensors(self, row: int) -> dict[str, Tensor]:
        return {"recurrent": self.recurrent[row], "conv": self.conv[row]}
