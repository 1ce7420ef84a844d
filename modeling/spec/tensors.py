"""What a request's state is made of, before there is memory for it."""

import math
from dataclasses import dataclass

import torch


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
    copies of what the projections gave."""

    recurrent: torch.dtype = torch.float32
    inputs: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        for name, dtype in vars(self).items():
            if not dtype.is_floating_point:
                raise ValueError(f"{name} states must be kept in a floating-point dtype, got {dtype}")


FLOAT32_STATES = StateTypes()

STATE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What recurrent states may be served in, by the names that users give."""
