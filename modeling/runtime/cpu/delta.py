"""The (gated) delta rule mixer as delta.h has it."""

from ctypes import Structure, c_float, c_int32, c_void_p

import torch

from modeling.layers import DeltaMixer
from modeling.runtime.cpu.parameters import Parameters
from modeling.state import DeltaState

_GATES = {"none": 0, "silu": 1, "sigmoid": 2}
_FLOATS = {torch.float32: 0, torch.bfloat16: 1}
"""Float dtypes as `StateType` of delta.h has them."""
_TYPES = {**_FLOATS, torch.int8: 2}
"""All dtypes, likewise."""


class Delta(Structure):
    """`Delta` of delta.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("in_proj", "o_proj")),
        *((name, c_void_p) for name in ("conv_weight", "conv_bias", "decay_rate", "dt_bias", "o_norm")),
        *((name, c_float) for name in ("o_norm_eps", "beta_scale")),
        *((name, c_int32) for name in ("num_k_heads", "num_v_heads", "d_k", "d_v")),
        *((name, c_int32) for name in ("conv_kernel", "has_beta", "gate")),
    ]

    @classmethod
    def of(cls, mixer: DeltaMixer, parameters: Parameters) -> "Delta":
        """A mixer's parameters, where they lie. Raises UnavailableError for one that the C++ does not take."""
        s = mixer.spec
        return cls(
            in_proj=parameters.matrix(mixer.in_proj.weight),
            o_proj=parameters.matrix(mixer.o_proj.weight),
            conv_weight=parameters.vector(mixer.conv.weight.t()),
            conv_bias=parameters.vector(mixer.conv.bias),
            decay_rate=parameters.vector(-mixer.A_log.float().exp()) if s.has_decay else None,
            dt_bias=parameters.vector(mixer.dt_bias) if s.has_decay else None,
            o_norm=parameters.vector(mixer.o_norm.weight),
            o_norm_eps=s.norm_eps,
            beta_scale=s.beta_scale,
            num_k_heads=s.num_k_heads,
            num_v_heads=s.num_v_heads,
            d_k=s.d_k,
            d_v=s.d_v,
            conv_kernel=s.conv_kernel,
            has_beta=s.has_beta,
            gate=_GATES[s.gate],
        )


class State(Structure):
    """`DeltaState` of delta.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("recurrent", "scales", "conv")),
        *((name, c_int32) for name in ("recurrent_type", "conv_type")),
    ]

    @classmethod
    def of(cls, state: DeltaState) -> "State":
        """Where a state's tensors are. Raises ValueError for tensors that the C++ would misread."""
        floats = tuple(_FLOATS)
        tensors = [(state.recurrent, floats if state.scales is None else (torch.int8,)), (state.conv, floats)]
        if state.scales is not None:
            tensors.append((state.scales, (torch.float32,)))
        for t, known in tensors:
            if t.dtype not in known or t.device.type != "cpu" or not t.is_contiguous():
                raise ValueError(
                    "states must be contiguous float32 or bfloat16 on the CPU, or int8 with scales if recurrent, got "
                    f"{t.dtype} on {t.device}"
                )
        return cls(
            state.recurrent.data_ptr(),
            None if state.scales is None else state.scales.data_ptr(),
            state.conv.data_ptr(),
            _TYPES[state.recurrent.dtype],
            _TYPES[state.conv.dtype],
        )
