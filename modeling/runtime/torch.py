"""Plain torch operations: any device, any kind of layer."""

from collections.abc import Callable, Sequence

from torch import Tensor

from modeling.layers import MLP, DeltaMixer, MoE
from modeling.model import Model
from modeling.spec import StateTypes
from modeling.state import LayerState, StatePool


class TorchRuntime:
    """A `modeling.runtime.Runtime` that goes from block to block. Those of certain machines inherit the way and have
    blocks of their own."""

    name = "torch"

    def __init__(self, model: Model) -> None:
        self.model = model
        self._blocks = model.blocks

    def prefill(self, input_ids: Tensor, cu_seqlens: Sequence[int], pool: StatePool, slots: Tensor) -> Tensor:
        x = self._embed(input_ids)
        for i, state in enumerate(pool.layers):
            x = self._prefill_block(i, x, cu_seqlens, state, slots)
        pool.advance(slots, cu_seqlens)
        return self._finish(x)

    def decode(self, input_ids: Tensor, pool: StatePool, slots: Tensor) -> Tensor:
        x = self._embed(input_ids)
        for i, state in enumerate(pool.layers):
            x = self._decode_block(i, x, state, slots)
        pool.advance(slots)
        return self._finish(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.logits(hidden)

    def check_states(self, types: StateTypes) -> None:
        """Nothing: all that a pool can hold is computed."""

    @property
    def recordable(self) -> bool:
        """Softmax attention asks the device how long each sequence is, and experts which of them are hit."""
        return all(type(b.mixer) is DeltaMixer and type(b.ffn) is MLP for b in self._blocks)

    @property
    def independent_rows(self) -> bool:
        """Each expert is a product of as many rows as there are tokens that take it."""
        return not any(isinstance(b.ffn, MoE) for b in self._blocks)

    def compile_ahead(self, work: Callable[[], object]) -> None:
        """Nothing: all is compiled."""

    def _embed(self, input_ids: Tensor) -> Tensor:
        """What goes into the first block."""
        x: Tensor = self.model.embeddings(input_ids)
        return x

    def _finish(self, x: Tensor) -> Tensor:
        """Hidden states after the final norm, of what comes out of the last block."""
        y: Tensor = self.model.norm(x)
        return y

    def _prefill_block(
        self, layer: int, x: Tensor, cu_seqlens: Sequence[int], state: LayerState, slots: Tensor
    ) -> Tensor:
        """Packed sequences through one layer, x `[tokens, hidden]`, which may be overwritten."""
        return self._blocks[layer].prefill(x, cu_seqlens, state, slots)

    def _decode_block(self, layer: int, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        """One token of each of B requests through one layer, x `[B, hidden]`, which may be overwritten."""
        return self._blocks[layer].decode(x, state, slots)
