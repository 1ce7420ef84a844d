"""Keys and values of softmax attention, which grow with every token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.spec import AttentionSpec, StateTypes


@dataclass
class KVState:
    """`modeling.state.LayerState` of a softmax attention mixer: for each row its keys and values, `[tokens,
    num_kv_heads, head_dim]` each, in tensors of their own.

    It reserves nothing and runs anywhere; each token makes new tensors, so it is for evaluation, not for serving.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @classmethod
    def zeros(
        cls, spec: AttentionSpec, rows: int, types: StateTypes, device: torch.device | str
    ) -> "KVState":
        """States before the first token."""
        empty = torch.empty(0, spec.num_kv_heads, spec.head_dim, dtype=types.inputs, device=device)
        return cls([empty] * rows, [empty] * rows)

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row before its first token: none."""
        return 0

    def zero(self, row: int) -> None:
        self.keys[row], self.values[row] = self.keys[row][:0], self.values[row][:0]

    def copy(self, source: int, target: int) -> None:
        # No tensor is ever written to, so that two rows may share one.
        self.keys[target], self.values[target] = self.keys[source], self.values[source]

    def gather(self, rows: Tensor) -> "KVState":
        chosen = rows.tolist()
        return KVState([self.keys[row] for row in chosen], [self.values[row] for row in chosen])

    def scatter(self, rows: Tensor, state: "KVState") -> None:
        for row, keys, values in zip(rows.tolist(), state.keys, state.values, strict=True):
            self.keys[row] = keys.to(self.keys[row].dtype)
            self.values[row] = values.to(self.values[row].dtype)

    def tensors(self, row: int) -> dict[str, Tensor]:
        return {"keys": self.keys[row], "values": self.values[row]}

    def extended(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> "KVState":
        """The state after more tokens: for each row `[new tokens, num_kv_heads, head_dim]` keys and values, in whose
        dtype all of it then is."""
        return KVState(
            [torch.cat([old.to(new.dtype), new]) for old, new in zip(self.keys, keys, strict=True)],
            [torch.cat([old.to(new.dtype), new]) for old, new in zip(self.values, values, strict=True)],
        )
