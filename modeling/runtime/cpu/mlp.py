"""The dense feed-forward as mlp.h has it."""

from ctypes import Structure, c_int32, c_void_p

from modeling.layers import MLP
from modeling.runtime.cpu.parameters import Parameters


class Mlp(Structure):
    """`Mlp` of mlp.h."""

    _fields_ = [("in_proj", c_void_p), ("out_proj", c_void_p), ("intermediate", c_int32)]

    @classmethod
    def of(cls, mlp: MLP, parameters: Parameters) -> "Mlp":
        """A feed-forward's parameters, where they lie. Raises UnavailableError for one that the C++ does not take."""
        return cls(
            parameters.matrix(mlp.in_proj.weight),
            parameters.matrix(mlp.out_proj.weight),
            mlp.out_proj.in_features,
        )
