"""A model's parameters as layer.h has them, and the calls."""

from collections.abc import Sequence
from ctypes import POINTER, Array, c_int, c_int64, c_void_p, pointer

import torch
from torch import Tensor

from modeling.huge_pages import gather_parameters
from modeling.model import Model
from modeling.runtime.cpu.build import compiled
from modeling.runtime.cpu.calls import check, offsets_of
from modeling.runtime.cpu.layer import AnyState, Layer, ModelStructure, check_layout, knows, states_of
from modeling.runtime.cpu.parameters import ROWS, Parameters
from modeling.state import DeltaState, LayerState


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
        check_layout(self._library)
        self._declare()
        self._parameters = Parameters(model.embeddings.weight.dtype)
        gather_parameters(model)
        layers = [Layer.of(block, self._parameters) if knows(block) else Layer() for block in model.blocks]
        self._layers = (Layer * len(layers))(*layers)
        shared = {
            "hidden": model.spec.hidden_size,
            "vocab": model.spec.vocab_size,
            "bf16_weights": self._parameters.dtype == torch.bfloat16,
        }
        self._parts = [
            ModelStructure(layers=pointer(layer), num_layers=1, **shared) for layer in self._layers
        ]
        self._model = ModelStructure(
            embeddings=self._parameters.matrix(model.embeddings.weight),
            norm=self._parameters.vector(model.norm.weight),
            layers=self._layers,
            norm_eps=model.spec.norm.eps,
            num_layers=len(layers),
            **shared,
        )

    def _declare(self) -> None:
        model, states, address = POINTER(ModelStructure), POINTER(AnyState), c_void_p
        lib = self._library
        lib.lowkey_decode.argtypes = (model, states, c_int64, c_int64, address, address, address, c_int)
        lib.lowkey_prefill.argtypes = (
            *(model, states, c_int64, c_int64),
            *(address, address, address, address),
            c_int,
        )
        lib.lowkey_linear.argtypes = (address, c_int64, c_int64, address, c_int64, address, c_int, c_int)

    def decode(self, input_ids: Tensor, states: Array[AnyState], rows: int, slots: Tensor) -> Tensor:
        """One token of each of B requests through the whole model.

        Args:
            input_ids: int64 `[B]`.
            states: each layer's (`states_of`), of so many rows, updated in place; but lengths of pages stay.
            slots: int64 `[B]`, distinct but for the null slot.

        Returns:
            Hidden states after the final norm, `[B, hidden]`, in the weights' dtype.

        Raises:
            IndexError: an id or a slot is out of range, or a slot has no place for a token; no state has moved then.
            ValueError: ids or slots have the wrong dtype, device or shape.
        """
        ids = _integers(input_ids, "ids")
        hidden = torch.empty(len(ids), self._model.hidden, dtype=self._parameters.dtype)
        return self._decode(self._model, ids, states, rows, slots, hidden)

    def decode_layer(self, layer: int, x: Tensor, state: LayerState, rows: int, slots: Tensor) -> Tensor:
        """One token of each of B requests through one layer: x float32 `[B, hidden]` -> output like x, in its memory.
        Raises as `decode`."""
        return self._decode(self._parts[layer], None, states_of([state]), rows, slots, x)

    def _decode(
        self,
        model: ModelStructure,
        ids: Tensor | None,
        states: Array[AnyState],
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

    def prefill(
        self,
        input_ids: Tensor,
        cu_seqlens: Sequence[int],
        states: Sequence[LayerState | DeltaState],
        rows: int,
        slots: Tensor,
    ) -> Tensor:
        """Packed sequences through the whole model.

        Args:
            input_ids: int64 `[tokens]`.
            cu_seqlens: offsets of the sequences.
            states: each layer's, updated in place; but lengths of pages stay. Delta states are float32, a row for each
                sequence; keys and values are those of a pool of so many rows.
            slots: int64 `[sequences]`, where each sequence's keys and values are.

        Returns:
            Hidden states after the final norm, `[tokens, hidden]`, in the weights' dtype.

        Raises:
            IndexError: an id or a slot is out of range, or a slot has no places for its tokens; no state has moved
                then.
            ValueError: ids, offsets, slots or states have the wrong dtype, device or shape.
        """
        ids = _integers(input_ids, "ids")
        hidden = torch.empty(len(ids), self._model.hidden, dtype=self._parameters.dtype)
        return self._prefill(self._model, ids, cu_seqlens, states, rows, slots, hidden)

    def prefill_layer(
        self,
        layer: int,
        x: Tensor,
        cu_seqlens: Sequence[int],
        state: LayerState | DeltaState,
        rows: int,
        slots: Tensor,
    ) -> Tensor:
        """Packed sequences through one layer: x float32 `[tokens, hidden]` -> output like x, in its memory. States and
        errors are as of `prefill`."""
        return self._prefill(self._parts[layer], None, cu_seqlens, [state], rows, slots, x)

    def _prefill(
        self,
        model: ModelStructure,
        ids: Tensor | None,
        cu_seqlens: Sequence[int],
        states: Sequence[LayerState | DeltaState],
        rows: int,
        slots: Tensor,
        hidden: Tensor,
    ) -> Tensor:
        offsets = offsets_of(cu_seqlens, len(hidden))
        sequences = len(offsets) - 1
        for state in states:
            if isinstance(state, DeltaState) and (
                len(state.recurrent) != sequences or state.recurrent.dtype != torch.float32
            ):
                raise ValueError(
                    f"{len(state.recurrent)} states in {state.recurrent.dtype} for {sequences} sequences, whose states "
                    "must be float32"
                )
        slots = _integers(slots, "slots", sequences)
        given = None if ids is None else ids.data_ptr()
        check(
            self._library.lowkey_prefill(
                *(model, states_of(states), rows, sequences),
                *(offsets.data_ptr(), given, slots.data_ptr(), hidden.data_ptr()),
                torch.get_num_threads(),
            )
        )
        return hidden

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x [n, in]` times `weight [out, in]` transposed, in float32.

        Raises:
            ValueError: shapes or dtypes that the C++ does not take; a weight has `ROWS` rows or more.
        """
        x = x.contiguous()
        if len(weight) < ROWS:
            raise ValueError(f"a weight of {len(weight)} rows; products take {ROWS} or more")
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


def _integers(x: Tensor, name: str, length: int | None = None) -> Tensor:
    x = x.contiguous()
    if x.dtype != torch.long or x.device.type != "cpu" or x.ndim != 1 or length not in (None, len(x)):
        shape = "[n]" if length is None else [length]
        raise ValueError(f"{name} must be int64 {shape} on the CPU, got {x.dtype} {list(x.shape)}")
    return x
