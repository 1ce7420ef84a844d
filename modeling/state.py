"""Recurrent and convolution state: of packed sequences, and of all requests of an engine (the slot pool)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.pages import zeros
from modeling.spec import ModelSpec


@dataclass
class SequenceState:
    """State of n packed sequences, per layer (layers may differ in d_k).

    `recurrent[i]` is `[n, num_v_heads, d_k, d_v]`, `conv[i]` is `[n, conv_channels, conv_kernel - 1]`.
    """

    recurrent: list[Tensor]
    conv: list[Tensor]


class StatePool:
    """Per-request state of one model, addressed by slot.

    Per layer a recurrent tensor `[slots, num_v_heads, d_k, d_v]` and a convolution tensor
    `[slots, conv_channels, conv_kernel - 1]`. A request owns one slot for its whole life; its state never grows.
    The tensors have one row more, `null_slot`, that belongs to nobody: a batch is padded with it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        state_dtype: torch.dtype = torch.float32,
        conv_dtype: torch.dtype = torch.float32,
    ) -> None:
        if slots < 1:
            raise ValueError(f"a state pool needs at least 1 slot, got {slots}")
        self.spec = spec
        self.num_slots = slots
        self.null_slot = slots
        self.state_dtype = state_dtype
        self.conv_dtype = conv_dtype
        self.recurrent: list[Tensor] = []
        self.conv: list[Tensor] = []
        for layer in spec.layers:
            m = layer.mixer
            self.recurrent.append(zeros([slots + 1, m.num_v_heads, m.d_k, m.d_v], state_dtype, device))
            self.conv.append(zeros([slots + 1, m.conv_channels, m.conv_kernel - 1], conv_dtype, device))
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
        return sum(t[0].nbytes for t in (*self.recurrent, *self.conv))

    def allocate(self, *, zero: bool = True) -> int | None:
        """A slot, or None when all are in use. Not zeroed, it holds anything, for a caller who overwrites it."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._used.add(slot)
        if zero:
            for t in (*self.recurrent, *self.conv):
                t[slot].zero_()
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back. Freeing one that is not in use is a bug and raises ValueError."""
        if slot not in self._used:
            raise ValueError(f"slot {slot} is not in use")
        self._used.remove(slot)
        self._free.append(slot)

    def copy(self, source: int, target: int) -> None:
        """Copy the whole state of one slot over another."""
        for t in (*self.recurrent, *self.conv):
            t[target].copy_(t[source])

    def gather(self, slots: Tensor) -> SequenceState:
        """Copies of the states in `slots` `[n]`, as initial states of packed sequences."""
        return SequenceState([t[slots] for t in self.recurrent], [t[slots] for t in self.conv])

    def scatter(self, slots: Tensor, state: SequenceState) -> None:
        """Write final states of packed sequences back to `slots` `[n]`."""
        for pool, new in zip((*self.recurrent, *self.conv), (*state.recurrent, *state.conv), strict=True):
            pool[slots] = new.to(pool.dtype)
