"""A model's parameters as layer.h has them, and the calls."""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Array, Structure, c_float, c_int, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from modeling.layers import Block
from modeling.ops import UnavailableError
from modeling.ops.cpu.build import compiled
from modeling.ops.cpu.calls import check, offsets_of
from modeling.pages import gather_parameters
from modeling.state import SequenceState, StatePool

if TYPE_CHECKING:
    from modeling.model import Model

ROWS = 8
"""Products work on this many rows at a time; no matrix may have fewer."""

_GATES = {"none": 0, "silu": 1, "sigmoid": 2}


class _Layer(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("mixer_norm", "mlp_norm")),
        *((name, c_void_p) for name in ("in_proj", "o_proj", "mlp_in", "mlp_out")),
        *((name, c_void_p) for name in ("conv_weight", "conv_bias", "decay_rate", "dt_bias", "o_norm")),
        *((name, c_float) for name in ("norm_eps", "o_norm_eps", "beta_scale")),
        *((name, c_int32) for name in ("num_k_heads", "num_v_heads", "d_k", "d_v")),
        *((name, c_int32) for name in ("conv_kernel", "has_beta", "gate", "intermediate")),
    ]


class _Model(Structure):
    _fields_ = [
        ("embeddings", c_void_p),
        ("norm", c_void_p),
        ("layers", POINTER(_Layer)),
        ("norm_eps", c_float),
        *((name, c_int32) for name in ("num_layers", "hidden", "vocab", "bf16_weights")),
    ]


class _Pool(Structure):
    _fields_ = [
        ("recurrent", POINTER(c_void_p)),
        ("conv", POINTER(c_void_p)),
        ("slots", c_int64),
        ("bf16_state", c_int32),
        ("bf16_conv", c_int32),
    ]


def _pointers(tensors: Sequence[Tensor]) -> Array[c_void_p]:
    return (c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


class CompiledModel:
    """One model's decode step, prefill and products, on a CPU, in one call each.

    It moves the parameters into large pages and reads them there; the small ones (norms, convolutions, decays) are
    copied as float32. Replace or move no parameter of the model afterwards.

    Raises:
        UnavailableError: no compiled library on this machine, or shapes or dtypes that it does not take.
    """

    def __init__(self, model: "Model") -> None:
        self._library = compiled()
        ours = ctypes.sizeof(_Layer) << 32 | ctypes.sizeof(_Model) << 16 | ctypes.sizeof(_Pool)
        self._library.lowkey_layout.restype = c_int64
        if self._library.lowkey_layout() != ours:
            raise UnavailableError("the C++ sources and compiled.py disagree about their structures")
        self._library.lowkey_decode.argtypes = (
            *(POINTER(_Model), POINTER(_Pool), c_int64),
            *(c_void_p, c_void_p, c_void_p, c_int),
        )
        self._library.lowkey_prefill.argtypes = (
            *(POINTER(_Model), POINTER(_Pool)),
            *(c_void_p, c_void_p, c_void_p, c_int),
        )
        self._library.lowkey_linear.argtypes = (
            *(c_void_p, c_int64, c_int64, c_void_p, c_int64),
            *(c_void_p, c_int, c_int),
        )
        spec, layers = model.spec, [block for block in model.layers if isinstance(block, Block)]
        self._dtype = model.embeddings.weight.dtype
        if self._dtype not in (torch.float32, torch.bfloat16):
            raise UnavailableError(f"weights are {self._dtype}; float32 or bfloat16 would do")
        gather_parameters(model)
        self._owner, self._spec = model, spec
        self._kept: list[Tensor] = []
        self._layers = (_Layer * len(layers))(*(self._layer(block) for block in layers))
        self._model = _Model(
            embeddings=self._matrix(model.embeddings.weight),
            norm=self._vector(model.norm.weight),
            layers=self._layers,
            norm_eps=spec.norm.eps,
            num_layers=len(layers),
            hidden=spec.hidden_size,
            vocab=spec.vocab_size,
            bf16_weights=self._dtype == torch.bfloat16,
        )

    def _keep(self, x: Tensor) -> int:
        self._kept.append(x)
        return x.data_ptr()

    def _matrix(self, x: Tensor) -> int:
        x = x.detach()
        if x.dtype != self._dtype or x.device.type != "cpu" or not x.is_contiguous():
            raise UnavailableError(
                f"a {x.dtype} matrix on {x.device} among {self._dtype} ones, or not contiguous"
            )
        if len(x) < ROWS:
            raise UnavailableError(f"a matrix of {len(x)} rows; at least {ROWS} would do")
        return self._keep(x)

    def _vector(self, x: Tensor | None) -> int | None:
        return None if x is None else self._keep(x.detach().float().contiguous())

    def _layer(self, block: Block) -> _Layer:
        mixer, s = block.mixer, block.mixer.spec
        return _Layer(
            mixer_norm=self._vector(block.mixer_norm.weight),
            mlp_norm=self._vector(block.mlp_norm.weight),
            in_proj=self._matrix(mixer.in_proj.weight),
            o_proj=self._matrix(mixer.o_proj.weight),
            mlp_in=self._matrix(block.mlp.in_proj.weight),
            mlp_out=self._matrix(block.mlp.out_proj.weight),
            conv_weight=self._vector(mixer.conv.weight.t()),
            conv_bias=self._vector(mixer.conv.bias),
            decay_rate=self._vector(-mixer.A_log.float().exp()) if s.has_decay else None,
            dt_bias=self._vector(mixer.dt_bias) if s.has_decay else None,
            o_norm=self._vector(mixer.o_norm.weight),
            norm_eps=block.mixer_norm.eps,
            o_norm_eps=s.norm_eps,
            beta_scale=s.beta_scale,
            num_k_heads=s.num_k_heads,
            num_v_heads=s.num_v_heads,
            d_k=s.d_k,
            d_v=s.d_v,
            conv_kernel=s.conv_kernel,
            has_beta=s.has_beta,
            gate=_GATES[s.gate],
            intermediate=block.mlp.in_proj.out_features // 2,
        )

    def decode(self, model: "Model", input_ids: Tensor, pool: StatePool, slots: Tensor) -> Tensor:
        """As `Model.decode`; activations are float32 whatever the weights are.

        Raises:
            IndexError: an id or a slot is out of range; no state has moved then.
            ValueError: the pool is another model's, or tensors have the wrong dtype, device or shape.
        """
        if pool.spec != model.spec or model is not self._owner:
            raise ValueError("the decode step or the state pool was made for another model's shapes")
        ids, slots = input_ids.contiguous(), slots.contiguous()
        for x in (ids, slots):
            if x.dtype != torch.long or x.device.type != "cpu" or x.shape != ids.shape or x.ndim != 1:
                raise ValueError(f"ids and slots must be int64 [B] on the CPU, got {x.dtype} {list(x.shape)}")
        state = _Pool(
            recurrent=_pointers(pool.recurrent),
            conv=_pointers(pool.conv),
            slots=len(pool.recurrent[0]),
            bf16_state=pool.state_dtype == torch.bfloat16,
            bf16_conv=pool.conv_dtype == torch.bfloat16,
        )
        hidden = torch.empty(len(ids), self._spec.hidden_size, dtype=self._dtype)
        check(
            self._library.lowkey_decode(
                self._model,
                state,
                len(ids),
                ids.data_ptr(),
                slots.data_ptr(),
                hidden.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return hidden

    def prefill(
        self, model: "Model", input_ids: Tensor, cu_seqlens: Sequence[int], state: SequenceState | None
    ) -> tuple[Tensor, SequenceState]:
        """As `Model.forward`, without gradients; activations and states are float32 whatever the weights are.

        Raises:
            IndexError: an id is out of range.
            ValueError: the model is another one, or tensors have the wrong dtype, device or shape.
        """
        if model is not self._owner:
            raise ValueError("the compiled model was made for another one")
        ids, offsets = input_ids.contiguous(), offsets_of(cu_seqlens, len(input_ids))
        if ids.dtype != torch.long or ids.device.type != "cpu" or ids.ndim != 1:
            raise ValueError(f"ids must be int64 [tokens] on the CPU, got {ids.dtype} {list(ids.shape)}")
        after = self._states(len(offsets) - 1, state)
        hidden = torch.empty(len(ids), self._spec.hidden_size, dtype=self._dtype)
        check(
            self._library.lowkey_prefill(
                self._model,
                _Pool(_pointers(after.recurrent), _pointers(after.conv), len(offsets) - 1),
                offsets.data_ptr(),
                ids.data_ptr(),
                hidden.data_ptr(),
                torch.get_num_threads(),
            )
        )
        return hidden, after

    def _states(self, sequences: int, before: SequenceState | None) -> SequenceState:
        """Float32 copies, or zeros."""
        after = SequenceState([], [])
        for i, layer in enumerate(self._spec.layers):
            m = layer.mixer
            recurrent = (sequences, m.num_v_heads, m.d_k, m.d_v)
            conv = (sequences, m.conv_channels, m.conv_kernel - 1)
            if before is None:
                after.recurrent.append(torch.zeros(recurrent))
                after.conv.append(torch.zeros(conv))
                continue
            for x, shape, to in (
                (before.recurrent[i], recurrent, after.recurrent),
                (before.conv[i], conv, after.conv),
            ):
                if x.shape != shape:
                    raise ValueError(f"layer {i}: a state of {list(x.shape)} where {list(shape)} is needed")
                to.append(x.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format))
        return after

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
