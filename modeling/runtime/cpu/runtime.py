"""A model on a CPU, compiled for the machine at hand."""

from collections.abc import Sequence
from ctypes import Array
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from modeling.model import Model
from modeling.runtime.cpu.compiled import CompiledModel, knows, states_of
from modeling.runtime.cpu.delta import State
from modeling.runtime.interface import UnavailableError
from modeling.runtime.torch import TorchRuntime
from modeling.state import DeltaState, LayerState, StatePool


class CpuRuntime(TorchRuntime):
    """`modeling.runtime.Runtime` in C++: in one call where all layers are of kinds that are written in C++, else from
    layer to layer, the others in plain torch operations. Activations are float32 whatever the weights are.

    Raises:
        UnavailableError: no layer is of a kind that is written in C++, there is no compiled library on this machine, or
            the model has shapes or dtypes that it does not take.
    """

    name = "cpu"

    def __init__(self, model: Model) -> None:
        super().__init__(model)
        known = [knows(block) for block in model.blocks]
        if not any(known):
            raise UnavailableError("no layer of the model is of a kind that is written in C++")
        self._whole = all(known)
        self._compiled = CompiledModel(model)
        # A pool's tensors stay where they are: their addresses are looked up once.
        self._addresses: WeakKeyDictionary[StatePool, Array[State]] = WeakKeyDictionary()

    def prefill(self, input_ids: Tensor, cu_seqlens: Sequence[int], pool: StatePool, slots: Tensor) -> Tensor:
        self._check(pool)
        if not self._whole:
            return super().prefill(input_ids, cu_seqlens, pool, slots)
        states = [_float32(state) for state in pool.gather(slots)]
        hidden = self._compiled.prefill(input_ids, cu_seqlens, states_of(states))
        pool.scatter(slots, states)
        return hidden

    def decode(self, input_ids: Tensor, pool: StatePool, slots: Tensor) -> Tensor:
        self._check(pool)
        if not self._whole:
            return super().decode(input_ids, pool, slots)
        if pool not in self._addresses:
            self._addresses[pool] = states_of([_delta(state) for state in pool.layers])
        return self._compiled.decode(input_ids, self._addresses[pool], pool.num_slots + 1, slots)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden, self.model.lm_head.weight)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x [n, in]` times `weight [out, in]` transposed, in float32."""
        return self._compiled.linear(x, weight)

    def _prefill_block(
        self, layer: int, x: Tensor, cu_seqlens: Sequence[int], state: LayerState
    ) -> tuple[Tensor, LayerState]:
        if not knows(self._blocks[layer]):
            return super()._prefill_block(layer, x, cu_seqlens, state)
        after = _float32(state)
        return self._compiled.prefill_layer(layer, x.float().contiguous(), cu_seqlens, after).to(
            x.dtype
        ), after

    def _decode_block(self, layer: int, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        if not knows(self._blocks[layer]):
            return super()._decode_block(layer, x, state, slots)
        return self._compiled.decode_layer(layer, x.float().contiguous(), _delta(state), slots).to(x.dtype)

    def _check(self, pool: StatePool) -> None:
        if pool.spec != self.model.spec:
            raise ValueError("the state pool was made for another model's shapes")


def _delta(state: LayerState) -> DeltaState:
    assert isinstance(state, DeltaState)
    return state


def _float32(state: LayerState) -> DeltaState:
    """The state itself where it is float32, else a copy that is."""
    delta = _delta(state)
    return DeltaState(delta.recurrent.to(torch.float32), delta.conv.to(torch.float32))
