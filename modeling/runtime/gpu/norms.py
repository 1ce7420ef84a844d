"""Norms of hidden states by one Triton kernel."""

import torch
from torch import Tensor

from modeling.layers import RMSNorm
from modeling.runtime.gpu.kernels.norms import rms_norm
from modeling.runtime.gpu.sizes import power_of_2


def normed(norm: RMSNorm, x: Tensor) -> Tensor:
    """The norm of x `[rows, size]`."""
    return _launch(norm, x, None, torch.empty_like(x))


def add_normed(norm: RMSNorm, x: Tensor, residual: Tensor) -> Tensor:
    """The residual `[rows, size]`, in its own memory, plus the norm of x, which is like it."""
    return _launch(norm, x, residual, residual)


def _launch(norm: RMSNorm, x: Tensor, residual: Tensor | None, out: Tensor) -> Tensor:
    rows, size = x.shape
    rms_norm[(rows,)](x, norm.weight, residual, out, norm.eps, size=size, block=power_of_2(size), num_warps=4)
    return out
