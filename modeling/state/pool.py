"""The states of all requests of an engine: a slot for each, and pages of keys and values."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from modeling.spec import FLOAT32_STATES, AttentionSpec, DeltaSpec, ModelSpec, StateTypes
from modeling.state.base import LayerState, SequenceState
from modeling.state.delta import DeltaState
from modeling.state.kv import PagedKV
from modeling.state.pages import Pages, page_bytes, pages_for
from modeling.state.transfer import device_memory_errors

MAKERS: dict[type, Callable[..., LayerState]] = {
    DeltaSpec: lambda spec, pages, types, device: DeltaState.zeros(spec, pages.rows, types, device),
    AttentionSpec: PagedKV.zeros,
}
"""What makes the states of a kind of mixer, by the class of its spec, from (spec, pages, types, device)."""


class StatePool:
    """Per-request state of one model, addressed by slot: `layers[i]` is what layer i's mixer keeps.

    A request owns one slot for as long as it runs. There is one row more than slots, `null_slot`, that belongs to
    nobody: a batch is padded with it. The keys and values of a model with softmax attention grow with the tokens: its
    slots have pages for them (`modeling.state.Pages`), which must be there before tokens are fed (`grow`).

    Args:
        slots: how many there are.
        pages: how many pages of keys and values there are; a model without softmax attention has no use for any.
        max_tokens: the most that one slot has pages for; None for the model's context.
        types: dtypes of the states.
    """

    def __init__(
        self,
        spec: ModelSpec,
        slots: int,
        *,
        pages: int = 0,
        max_tokens: int | None = None,
        device: torch.device | str = "cpu",
        types: StateTypes = FLOAT32_STATES,
    ) -> None:
        if slots < 1:
            raise ValueError(f"a state pool needs at least 1 slot, got {slots}")
        self.bytes_per_page = page_bytes(spec, types)
        if self.bytes_per_page and pages < 1:
            raise ValueError(f"the state pool of a model with softmax attention needs pages, got {pages}")
        self.spec = spec
        self.device = torch.device(device)
        self.num_slots = slots
        self.null_slot = slots
        self.types = types
        pages = pages if self.bytes_per_page else 0
        self.pages = Pages(slots + 1, pages, max_tokens or spec.context_length, device)
        self.layers: list[LayerState] = [
            MAKERS[type(layer.mixer)](layer.mixer, self.pages, types, device) for layer in spec.layers
        ]
        self._free = list(range(slots - 1, -1, -1))
        self._used: set[int] = set()

    @classmethod
    def with_room(
        cls,
        spec: ModelSpec,
        slots: int,
        tokens: int,
        *,
        device: torch.device | str = "cpu",
        types: StateTypes = FLOAT32_STATES,
    ) -> "StatePool":
        """A pool each of whose slots has pages for `tokens` tokens already."""
        pages = slots * pages_for(tokens)
        pool = cls(spec, slots, pages=pages, max_tokens=tokens, device=device, types=types)
        for slot in range(slots):
            pool.grow(slot, tokens)
        return pool

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def used_slots(self) -> int:
        return len(self._used)

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of tensor that each slot has by itself, without pages."""
        return sum(layer.bytes_per_row for layer in self.layers)

    @property
    def conv_bytes_per_slot(self) -> int:
        """The part of `bytes_per_slot` that is the last inputs of short convolutions."""
        return sum(layer.conv[0].nbytes for layer in self.layers if isinstance(layer, DeltaState))

    def allocate(self, *, zero: bool = True) -> int | None:
        """A slot, or None when all are in use. Not zeroed, it holds anything, for a caller who overwrites it."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._used.add(slot)
        if zero:
            for layer in self.layers:
                layer.zero(slot)
            self.pages.set_length(slot, 0)
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back, with its pages. Freeing one that is not in use is a bug and raises ValueError."""
        if slot not in self._used:
            raise ValueError(f"slot {slot} is not in use")
        self._used.remove(slot)
        self._free.append(slot)
        self.pages.release(slot)

    def grow(self, slot: int, tokens: int) -> bool:
        """Have pages for the first `tokens` tokens of a slot's state. False if there are not enough."""
        return self.pages.grow(slot, tokens)

    def copy(self, source: int, target: int) -> None:
        """Copy the whole state of one slot over another, which has pages for it (`Pages.share`)."""
        for layer in self.layers:
            layer.copy(source, target)
        self.pages.copy_length(source, target)

    def gather(self, slots: Tensor) -> list[SequenceState]:
        """Copies of the states in `slots` `[n]`, layer by layer, as initial states of packed sequences."""
        return [layer.gather(slots) for layer in self.layers]

    def scatter(self, slots: Tensor, states: Sequence[SequenceState]) -> None:
        """Write final states of packed sequences, layer by layer, back to `slots` `[n]`; `advance` says of how many
        tokens they are."""
        for layer, new in zip(self.layers, states, strict=True):
            layer.scatter(slots, new)

    def advance(self, slots: Tensor, cu_seqlens: Sequence[int] | None = None) -> None:
        """The states of `slots` int64 `[n]` have seen the tokens of packed sequences, whose offsets are `cu_seqlens`;
        None for one token each. To be called once all layers' states have."""
        self.pages.advance(slots, cu_seqlens)

    def tensors(self, slot: int, tokens: int) -> dict[str, Tensor]:
        """One slot's whole state, of so many tokens, by the names that its tensors have in a file, `layers.{i}.{name}`:
        where they lie, or copies."""
        return _named(layer.tensors(slot, tokens) for layer in self.layers)

    def to_host(self, slot: int, tokens: int) -> dict[str, Tensor]:
        """Copies of `tensors` on the host; from a GPU they are only queued, in pinned memory, and whole once the device
        has done all that it had been given. Raises MemoryError."""
        with device_memory_errors():
            return _named(layer.to_host(slot, tokens) for layer in self.layers)

    def load(self, slot: int, tensors: Mapping[str, Tensor], tokens: int) -> None:
        """Make a slot, which has pages for it, the state of `tokens` tokens that `tensors` holds, on the host and named
        as `tensors` names them; on a GPU behind all work that the device has been given. It may be called in any
        thread. Raises MemoryError."""
        for i, layer in enumerate(self.layers):
            of_layer = f"layers.{i}."
            own = {name.removeprefix(of_layer): t for name, t in tensors.items() if name.startswith(of_layer)}
            with device_memory_errors():
                layer.load(slot, own)
        self.pages.set_length(slot, tokens)


def _named(layers: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"layers.{i}.{name}": t for i, tensors in enumerate(layers) for name, t in tensors.items()}
