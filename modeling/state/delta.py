"""The state of a (gated) delta rule mixer, of fixed size: it never grows with the tokens."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.huge_pages import zeros
from modeling.spec import DeltaSpec, StateTypes
from modeling.state.rounding import narrow, widen
from modeling.state.transfer import put, to_host


@dataclass(frozen=True)
class DeltaState:
    """`modeling.state.LayerState` of a delta rule mixer.

    `recurrent` is `[rows, num_v_heads, d_k, d_v]`, K-first, and `conv`, the last inputs of the short convolution, is
    `[rows, conv_channels, conv_kernel - 1]`. A recurrent state in int8 is kept in units of `scales`, float32
    `[rows, num_v_heads, d_v]`; else there are none.
    """

    recurrent: Tensor
    conv: Tensor
    scales: Tensor | None = None

    @classmethod
    def zeros(cls, spec: DeltaSpec, rows: int, types: StateTypes, device: torch.device | str) -> "DeltaState":
        """States before the first token."""
        made = {
            name: zeros([rows, *tensor.shape], tensor.dtype, device)
            for name, tensor in spec.state_tensors(types).items()
        }
        return cls(**made)

    @property
    def _all(self) -> dict[str, Tensor]:
        return {name: t for name, t in vars(self).items() if t is not None}

    @property
    def bytes_per_row(self) -> int:
        return sum(t[0].nbytes for t in self._all.values())

    def zero(self, row: int) -> None:
        for t in self._all.values():
            t[row].zero_()

    def copy(self, source: int, target: int) -> None:
        for t in self._all.values():
            t[target].copy_(t[source])

    def gather(self, rows: Tensor) -> "DeltaState":
        recurrent = self.recurrent[rows]
        if self.scales is not None:
            recurrent = widen(recurrent, self.scales[rows])
        return DeltaState(recurrent, self.conv[rows])

    def scatter(self, rows: Tensor, state: "DeltaState") -> None:
        recurrent = state.recurrent
        if self.scales is not None:
            recurrent, self.scales[rows] = narrow(recurrent)
        self.recurrent[rows] = recurrent.to(self.recurrent.dtype)
        self.conv[rows] = state.conv.to(self.conv.dtype)

    def tensors(self, row: int, tokens: int) -> dict[str, Tensor]:
        return {name: t[row] for name, t in self._all.items()}

    def to_host(self, row: int, tokens: int) -> dict[str, Tensor]:
        return {name: to_host(t[row]) for name, t in self._all.items()}

    def load(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        for name, t in self._all.items():
            put(tensors[name], t[row])
