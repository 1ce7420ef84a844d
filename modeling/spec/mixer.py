"""What every kind of mixer's spec says."""

from typing import Protocol

from modeling.spec.tensors import StateTypes


class MixerSpec(Protocol):
    """One kind of token mixer; frozen and hashable."""

    def state_bytes(self, tokens: int, types: StateTypes) -> int:
        """Bytes of state that it keeps of a request of `tokens` tokens."""
        ...
