"""The states of all requests of an engine: a slot for each."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from modeling.spec import FLOAT32_STATES, AttentionSpec, DeltaSpec, ModelSpec, StateTypes
from modeling.state.base import LayerState
from modeling.state.delta import DeltaState
from modeling.state.kv import KVState

MAKERS: dict[type, Callable[..., LayerState]] = {
    DeltaSpec: DeltaState.zeros,
    AttentionSpec: KVState.zeros,
}
"""What makes the states of a kind of mixer, by the class of its spec, from (spec, rows, types, device)."""


class StatePool:
    """Per-request state of one model, addressed by slot: `layers[i]` is what layer i's mixer keeps.

    A request owns one slot for its whole life. There is one row more than slots, `null_slot`, that belongs to nobody: a
    batch is padded with it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        types: StateTypes = FLOAT32_STATES,
    ) -> None:
        if slots < 1:
            raise ValueError(f"a state pool needs at least 1 slot, got {slots}")
        self.spec = spec
        self.num_slots = slots
        self.null_slot = slots
        self.types = types
        self.layers: list[LayerState] = [
            MAKERS[type(layer.mixer)](layer.mixer, slots + 1, types, device) for layer in spec.layers
        ]
        self._free = list(range(slots - 1, -1, -1))
        self._used: set[int] = set()

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def used_slots(self) -> int:
        return len(self._used)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of tensor that one request really holds."""
        return sum(layer.bytes_per_row for layer in self.layers)

    def allocate(self, *, zero: bool = True) -> int | None:
        """A slot, or None when all are in use. Not zeroed, it holds anything, for a caller who overwrites it."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._used.add(slot)
        if zero:
            for layer in self.layers:
                layer.zero(slot)
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back. Freeing one that is not in use is a bug and raises ValueError."""
        if slot not in self._used:
            raise ValueError(f"slot {slot} is not in use")
        self._used.remove(slot)
        self._free.append(slot)

    def copy(self, source: int, target: int) -> None:
        """Copy the whole state of one slot over another."""
        for layer in self.layers:
            layer.copy(source, target)

    def gather(self, slots: Tensor) -> list[LayerState]:
        """Copies of the states in `slots` `[n]`, layer by layer, as initial states of packed sequences."""
        return [layer.gather(slots) for layer in self.layers]

    def scatter(self, slots: Tensor, states: Sequence[LayerState]) -> None:
        """Write final states of packed sequences, layer by layer, back to `slots` `[n]`."""
        for layer, new in zip(self.layers, states, strict=True):
            layer.scatter(slots, new)

    def tensors(self, slot: int) -> dict[str, Tensor]:
        """Views of one slot's whole state by the names that they have in a file, `layers.{i}.{name}`."""
        return {
            f"layers.{i}.{name}": t
            for i, layer in enumerate(self.layers)
            for name, t in layer.tensors(slot).items()
        }
