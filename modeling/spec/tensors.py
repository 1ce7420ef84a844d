"""What a request's state is made of, before there is memory for it."""

import math
from dataclasses import dataclass

import torch

from modeling.state_dtype import StateDType


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StateTypes:
    """The dtypes that states are kept in: `recurrent` for the sums that a mixer adds to with each token, `inputs` for
    copies of what the projections gave. A recurrent state in int8 has scales beside it (`modeling.state.rounding`)."""

    recurrent: torch.dtype = torch.float32
    inputs: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, dtype in vars(self).items():
            if not dtype.is_floating_point and (name, dtype) != ("recurrent", torch.int8):
                or_int8 = " or int8" if name == "recurrent" else ""
                raise ValueError(
                    f"{name} states must be kept in a floating-point dtype{or_int8}, got {dtype}"
                )

    @classmethod
    def named(cls, name: StateDType, weights: torch.dtype) -> "StateTypes":
        """The types of a model served with this state dtype.

        Beside a float32 state the last inputs are kept as the weights are, which rounds nothing. A narrower one is to
        save bytes: they are in bfloat16.
        """
        return cls(getattr(torch, name), weights if name == "float32" else torch.bfloat16)


FLOAT32_STATES = StateTypes()
