"""The mixture of experts as moe.h has it."""

from ctypes import Structure, c_int32, c_void_p

import torch
import torch.nn.functional as F

from modeling.layers import MoE
from modeling.runtime.cpu.mlp import Mlp
from modeling.runtime.cpu.parameters import ROWS, Parameters


class Moe(Structure):
    """`Moe` of moe.h."""

    _fields_ = [
        *((name, c_void_p) for name in ("router", "in_proj", "out_proj")),
        ("shared", Mlp),
        *((name, c_int32) for name in ("router_rows", "num_experts", "top_k", "expert_size")),
    ]

    @classmethod
    def of(cls, moe: MoE, parameters: Parameters) -> "Moe":
        """A feed-forward's parameters, where they lie, but for a copy of the router. Raises UnavailableError for one
        that the C++ does not take."""
        router = torch.cat([moe.router.weight, moe.shared_gate.weight]).detach()
        router = F.pad(router, (0, 0, 0, max(ROWS - len(router), 0)))
        return cls(
            parameters.matrix(router),
            parameters.matrix(moe.in_proj),
            parameters.matrix(moe.out_proj),
            Mlp.of(moe.shared, parameters),
            len(router),
            moe.spec.num_experts,
            moe.spec.top_k,
            moe.spec.expert_size,
        )
