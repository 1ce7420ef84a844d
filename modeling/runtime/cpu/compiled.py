"""A model's parameters as layer.h has them, and the calls."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Array, Structure, c_float, c_int, c_int32, c_int64, c_void_p, pointer

import torch
from torch import Tensor

from modeling.huge_pages import gather_parameters
from modeling.layers import MLP, Block, DeltaMixer
from modeling.model import Model
from modeling.runtime.cpu.build import compiled
from modeling.runtime.cpu.calls import check, offsets_of
from modeling.runtime.cpu.delta import Delta, State
from modeling.runtime.cpu.mlp import Mlp
from modeling.runtime.cpu.parameters import Parameters
from modeling.runtime.interface import UnavailableError
from modeling.state import DeltaState


class _Layer(Structure):
    _fields_ = [
        ("mixer_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("norm_eps", c_float),
        ("mixer", Delta),
        ("ffn", Mlp),
    ]


class _Model(Structure):
    _fields_ = [
        ("embeddings", c_void_p),
        ("norm", c_void_p),
        ("layers", POINTER(_Layer)),
        ("norm_eps", c_float),
        *((name, c_int32) for name in ("num_layers", "hidden", "vocab", "bf16_weights")),
    ]


def knows(block: Block) -> bool:
    """Whether a layer's mixer and feed-forward are of kinds that are written in C++, with their norms in front."""
    return isinstance(block.mixer, DeltaMixer) and isinstance(block.ffn, MLP) and not block.norm_after


class CompiledModel:
    """One model's steps, prompts and products on a CPU, in one call each for the whole model or for one layer.

    It moves the parameters into large pages and reads them there; the small ones (norms, convolutions, decays) are
    copied as float32. Replace or move no parameter of the model afterwards. Activations are float32 whatever the
    weights are. A model with a layer that it does not know (`knows`) may be run layer by layer only, and that layer not
    at all.

    Raises:
        UnavailableError: no compiled library on this machine, or shapes or dtypes that it does not take.
    """

    def __init__(self, model: Model) -> None:
        self._library = compiled()
        sizes = ((_Layer, 40), (Delta, 20), (_Model, 10), (State, 0))
        self._library.lowkey_layout.restype = c_int64
        if self._library.lowkey_layout() != sum(ctypes.sizeof(s) << shift for s, shift in sizes):
            raise UnavailableError(
                "the C++ sources and their mirrors in Python disagree about their structures"
            )
        self._declare()
        self._parameters = Parameters(model.embeddings.weight.dtype)
        gather_parameters(model)
        layers = [self._layer(block) if knows(block) else _Layer() for block in model.blocks]
        self._layers = (_Layer * len(layers))(*layers)
        shared = {
            "hidden": model.spec.hidden_size,
            "vocab": model.spec.vocab_size,
            "bf16_weights": self._parameters.dtype == torch.bfloat16,
        }
        self._parts = [_Model(layers=pointer(layer), num_layers=1, **shared) for layer in self._layers]
        self._model = _Model(
            embeddings=self._parameters.matrix(model.embeddings.weight),
            norm=self._parameters.vector(model.norm.weight),
            layers=self._layers,
            norm_eps=model.spec.norm.eps,
            num_layers=len(layers),
            **shared,
        )

    def _declare(self) -> None:
        model, states, address = POINTER(_Model), POINTER(State), c_void_p
        lib = self._library
        lib.lowkey_decode.argtypes = (model, states, c_int64, c_int64, address, address, address, c_int)
        lib.lowkey_prefill.argtypes = (model, states, c_int64, address, address, address, c_int)
        lib.lowkey_linear.argtypes = (address, c_int64, c_int64, address, c_int64, address, c_int, c_int)

    def _layer(self, block: Block) -> _Layer:
        assert isinstance(block.mixer, DeltaMixer)
        assert isinstance(block.ffn, MLP)
        return _Layer(
            mixer_norm=self._parameters.vector(block.mixer_norm.weight),
            ffn_norm=self._parameters.vector(block.ffn_norm.weight),
            norm_eps=block.mixer_norm.eps,
            mixer=Delta.of(block.mixer, self._parameters),
            ffn=Mlp.of(block.ffn, self._parameters),
        )

    def decode(self, input_ids: Tensor, states: Array[State], rows: int, slots: Tensor) -> Tensor:
        """One token of each of B requests through the whole model.

        Args:
            input_ids: int64 `[B]`.
            states: each layer's, of so many rows, updated in place.
            slots: int64 `[B]`, distinct.

        Returns:
            Hidden states after the final norm, `[B, hidden]`, in the weights' dtype.

        Raises:
            IndexError: an id or a slot is out of range; no state has moved then.
            ValueError: ids or slots have the wrong dtype, device or shape.
        """
        ids = _integers(input_ids, "ids")
        hidden = torch.empty(len(ids), self._model.hidden, dtype=self._parameters.dtype)
        return self._decode(self._model, ids, states, rows, slots, hidden)

    def decode_layer(self, layer: int, x: Tensor, state: DeltaState, slots: Tensor) -> Tensor:
        """One token of each of B requests through one layer: x float32 `[B, hidden]` -> output like x, in its memory.
        Raises as `decode`."""
        return self._decode(self._parts[layer], None, State.of(state), len(state.recurrent), slots, x)

    def _decode(
        self,
        model: _Model,
        ids: Tensor | None,
        states: Array[State] | State,
        rows: int,
        slots: Tensor,
        hidden: Tensor,
    ) -> Tensor:
        slots = _integers(slots, "slots", len(hidden))
        given = None if ids is None else ids.data_ptr()
        at, threads = slots.data_ptr(), torch.get_num_threads()
        check(
            self._library.lowkey_decode(
                model, states, rows, len(hidden), given, at, hidden.data_ptr(), threads
            )
        )
        return hidden

    def prefill(self, input_ids: Tensor, cu_seqlens: Sequence[int], states: Sequence[DeltaState]) -> Tensor:
        """Packed sequences through the whole model.

        Args:
            input_ids: int64 `[tokens]`.
            cu_seqlens: offsets of the sequences.
            states: each layer's, float32, a row for each sequence; updated in place.

        Returns:
            Hidden states after the final norm, `[tokens, hidden]`, in the weights' dtype.

        Raises:
            IndexError: an id is out of range; no state has moved then.
            ValueError: ids, offsets or states have the wrong dtype, device or shape.
        """
        ids = _integers(input_ids, "ids")
        hidden = torch.empty(len(ids), self._model.hidden, dtype=self._parameters.dtype)
        return self._prefill(self._model, ids, cu_seqlens, states, hidden)

    def prefill_layer(self, layer: int, x: Tensor, cu_seqlens: Sequence[int], state: DeltaState) -> Tensor:
        """Packed sequences through one layer: x float32 `[tokens, hidden]` -> output like x, in its memory. The state
        is float32, a row for each sequence, and updated in place. Raises as `prefill`."""
        return self._prefill(self._parts[layer], None, cu_seqlens, [state], x)

    def _prefill(
        self,
        model: _Model,
        ids: Tensor | None,
        cu_seqlens: Sequence[int],
        states: Sequence[DeltaState],
        hidden: Tensor,
    ) -> Tensor:
        offsets = offsets_of(cu_seqlens, len(hidden))
        sequences = len(offsets) - 1
        for state in states:
            if len(state.recurrent) != sequences or state.recurrent.dtype != torch.float32:
                raise ValueError(
                    f"{len(state.recurrent)} states in {state.recurrent.dtype} for {sequences} sequences, whose states "
                    "must be float32"
                )
        given = None if ids is None else ids.data_ptr()
        at, threads = offsets.data_ptr(), torch.get_num_threads()
        check(
            self._library.lowkey_prefill(
                model, states_of(states), sequences, at, given, hidden.data_ptr(), threads
            )
        )
        return hidden

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x [n, in]` times `weight [out, in]` transposed, in float32."""
        x = x.contiguous()
        if x.dtype != weight.dtype or x.shape[1] != weight.shape[1] or not weight.is_contiguous():
            raise ValueError(
                f"can't multiply {x.dtype} {list(x.shape)} by {weight.dtype} {list(weight.shape)} transposed"
            )
        y = torch.empty(len(x), len(weight))
        check(
            self._library.lowkey_linear(
                x.data_ptr(),
                *x.shape,
                weight.data_ptr(),
                len(weight),
                y.data_ptr(),
                weight.dtype == torch.bfloat16,
                torch.get_num_threads(),
            )
        )
        return y


def states_of(states: Sequence[DeltaState]) -> Array[State]:
    """The addresses of each layer's states. Raises ValueError for some that the C++ would misread."""
    return (State * len(states))(*map(State.of, states))


def _integers(x: Tensor, name: str, length: int | None = None) -> Tensor:
    x = x.contiguous()
    if x.dtype != torch.long or x.device.type != "cpu" or x.ndim != 1 or length not in (None, len(x)):
        shape = "[n]" if length is None else [length]
        raise ValueError(f"{name} must be int64 {shape} on the CPU, got {x.dtype} {list(x.shape)}")
    return x
