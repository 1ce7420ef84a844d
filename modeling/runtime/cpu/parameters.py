"""A model's parameters, as the C++ reads them."""

import torch
from torch import Tensor

from modeling.runtime.interface import UnavailableError

ROWS = 8
"""Products work on this many rows at a time; no matrix may have fewer."""


class Parameters:
    """Addresses of tensors, which live as long as this does.

    Raises:
        UnavailableError: the weights' dtype is not one that the C++ reads.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        if dtype not in (torch.float32, torch.bfloat16):
            raise UnavailableError(f"weights are {dtype}; float32 or bfloat16 would do")
        self.dtype = dtype
        self._kept: list[Tensor] = []

    def keep(self, x: Tensor) -> int:
        """A contiguous tensor of any dtype, as it is."""
        self._kept.append(x)
        return x.data_ptr()

    def matrix(self, x: Tensor) -> int:
        """A matrix `[out, in]`, or several of one size `[n, out, in]`, read where they lie. Raises UnavailableError."""
        x = x.detach()
        if x.dtype != self.dtype or x.device.type != "cpu" or not x.is_contiguous():
            raise UnavailableError(
                f"a {x.dtype} matrix on {x.device} among {self.dtype} ones, or not contiguous"
            )
        if x.shape[-2] < ROWS:
            raise UnavailableError(f"a matrix of {x.shape[-2]} rows; at least {ROWS} would do")
        return self.keep(x)

    def vector(self, x: Tensor | None) -> int | None:
        """A float32 copy of something small, or None."""
        return None if x is None else self.keep(x.detach().float().contiguous())
