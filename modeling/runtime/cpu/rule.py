"""The gated delta rule over packed sequences, compiled."""

from ctypes import POINTER, Structure, c_float, c_int, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from modeling.ops import RuleInputs
from modeling.runtime.cpu.build import compiled
from modeling.runtime.cpu.calls import check, offsets_of


class _Rule(Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "log_decay", "beta", "state", "o", "cu_seqlens")),
        ("sequences", c_int64),
        ("scale", c_float),
        *((name, c_int32) for name in ("num_k_heads", "num_v_heads", "d_k", "d_v")),
    ]


def compiled_gated_delta_rule(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """`modeling.ops.GatedDeltaRule` in float32, without gradients.

    Raises:
        ValueError: shapes that do not go together.
        UnavailableError: no compiled library on this machine.
    """
    tokens, num_v_heads, d_v = inputs.v.shape
    num_k_heads, d_k = inputs.k.shape[1:]
    offsets = offsets_of(inputs.cu_seqlens, tokens)
    q, k, v, beta = (x.float().contiguous() for x in (inputs.q, inputs.k, inputs.v, inputs.beta))
    g = None if inputs.g is None else inputs.g.float().contiguous()
    state = torch.zeros(len(offsets) - 1, num_v_heads, d_k, d_v)
    gates = [x.shape for x in (beta, g) if x is not None]
    if (
        q.shape != k.shape
        or len(k) != tokens
        or num_v_heads % num_k_heads
        or any(shape != (tokens, num_v_heads) for shape in gates)
        or (inputs.initial_state is not None and inputs.initial_state.shape != state.shape)
    ):
        raise ValueError(
            f"shapes that do not go together: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if inputs.initial_state is not None:
        state.copy_(inputs.initial_state)
    o = torch.empty_like(v)
    rule = _Rule(
        *(x.data_ptr() for x in (q, k, v)),
        None if g is None else g.data_ptr(),
        *(x.data_ptr() for x in (beta, state, o, offsets)),
        len(offsets) - 1,
        inputs.scale,
        *(num_k_heads, num_v_heads, d_k, d_v),
    )
    run = compiled().lowkey_rule
    run.argtypes = (POINTER(_Rule), c_int)
    check(run(rule, torch.get_num_threads()))
    return o, state
