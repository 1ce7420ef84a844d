"""A model on a CPU, compiled for the machine at hand."""

import logging
from collections.abc import Sequence
from ctypes import Array
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from modeling.model import Model
from modeling.runtime.cpu.compiled import CompiledModel
from modeling.runtime.cpu.layer import AnyState, knows, states_of
from modeling.runtime.interface import UnavailableError
from modeling.runtime.torch import TorchRuntime
from modeling.state import DeltaState, LayerState, PagedKV, StatePool

logger = logging.getLogger("lowkey.modeling")


class CpuRuntime(TorchRuntime):
    """`modeling.runtime.Runtime` in C++: in one call where all layers are of kinds that are written in C++, else from
    layer to layer, the others in plain torch operations, as the log then says. What passes between layers is float32
    whatever the weights are.

    Raises:
        UnavailableError: no layer is of a kind that is written in C++, there is no compiled library on this machine, or
            the model has shapes or dtypes that it does not take.
    """

    name = "cpu"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        unknown = [i for i, block in enumerate(self._blocks) if not knows(block)]
        if len(unknown) == len(self._blocks):
            raise UnavailableError("no layer of the model is of a kind that is written in C++")
        if unknown:
            logger.warning("layers %s are of kinds that are not written in C++: plain torch, slower", unknown)
        self._whole = not unknown
        self._compiled = CompiledModel(model)
        self._dtype = model.embeddings.weight.dtype
        # A pool's tensors stay where they are: their addresses are looked up once.
        self._addresses: WeakKeyDictionary[StatePool, Array[AnyState]] = WeakKeyDictionary()

    def prefill(self, input_ids: Tensor, cu_seqlens: Sequence[int], pool: StatePool, slots: Tensor) -> Tensor:
        self._check(pool)
        if bool((slots < 0).any()) or bool((slots > pool.null_slot).any()):
            raise IndexError("a slot is outside the pool")
        if not self._whole:
            return super().prefill(input_ids, cu_seqlens, pool, slots)
        states = [_taken(layer, slots) for layer in pool.layers]
        hidden = self._compiled.prefill(input_ids, cu_seqlens, states, pool.num_slots + 1, slots)
        for layer, state in zip(pool.layers, states, strict=True):
            _put_back(layer, state, slots)
        pool.advance(slots, cu_seqlens)
        return hidden

    def decode(self, input_ids: Tensor, pool: StatePool, slots: Tensor) -> Tensor:
        self._check(pool)
        if not self._whole:
            return super().decode(input_ids, pool, slots)
        if pool not in self._addresses:
            self._addresses[pool] = states_of(pool.layers)
        hidden = self._compiled.decode(input_ids, self._addresses[pool], pool.num_slots + 1, slots)
        pool.advance(slots)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden, self.model.lm_head.weight)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x [n, in]` times `weight [out, in]` transposed, in float32."""
        return self._compiled.linear(x, weight)

    def _embed(self, input_ids: Tensor) -> Tensor:
        return super()._embed(input_ids).float()

    def _finish(self, x: Tensor) -> Tensor:
        return super()._finish(x).to(self._dtype)

    def _prefill_block(
        self, layer: int, x: Tensor, cu_seqlens: Sequence[int], state: LayerState, slots: Tensor
    ) -> Tensor:
        if not knows(self._blocks[layer]):
            return super()._prefill_block(layer, x.to(self._dtype), cu_seqlens, state, slots).float()
        taken = _taken(state, slots)
        x = self._compiled.prefill_layer(layer, x.contiguous(), cu_seqlens, taken, _rows(state), slots)
        _put_back(state, taken, slots)
        return x

    def _decode_block(self, layer: int, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        if not knows(self._blocks[layer]):
            return super()._decode_block(layer, x.to(self._dtype), state, slots).float()
        return self._compiled.decode_layer(layer, x.contiguous(), state, _rows(state), slots)

    def _check(self, pool: StatePool) -> None:
        if pool.spec != self.model.spec:
            raise ValueError("the state pool was made for another model's shapes")


def _rows(state: LayerState) -> int:
    """Slots of the pool that the state of a layer is of, with the null slot."""
    return state.pages.rows if isinstance(state, PagedKV) else len(_delta(state).recurrent)


def _taken(state: LayerState, slots: Tensor) -> LayerState | DeltaState:
    """The state that a prefill works on: float32 copies of delta states, a row for each sequence; pages as they are."""
    if isinstance(state, PagedKV):
        return state
    rows = _delta(state).gather(slots)
    return DeltaState(rows.recurrent.to(torch.float32), rows.conv.to(torch.float32))


def _put_back(state: LayerState, taken: LayerState | DeltaState, slots: Tensor) -> None:
    """Write what was copied, and has moved on, back to the pool."""
    if taken is not state:
        _delta(state).scatter(slots, _delta(taken))


def _delta(state: LayerState | DeltaState) -> DeltaState:
    assert isinstance(state, DeltaState)
    return state
