"""The products of a layer, with what stands before and behind each of them."""

import torch
from torch import Tensor

from modeling.layers import RMSNorm
from modeling.runtime.gpu.kernels.mlp import swiglu
from modeling.runtime.gpu.norms import normed
from modeling.runtime.gpu.sizes import ceil_div

SWIGLU_BLOCK = 1024
"""Columns that a program of `swiglu` takes at a time."""


def product(x: Tensor, weight: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
    """norm(x) times the transposed weight.

    Args:
        x: `[rows, in]`.
        weight: `[out, in]`.
        norm: what x is normalised by before; None for nothing.
        residual: what the product is added to, `[rows, out]`, in its own memory. It may be x itself.

    Returns:
        `[rows, out]` in x's dtype.
    """
    return _add(x if norm is None else normed(norm, x), weight, residual)


def swiglu_product(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
    """silu(gate) * up times the transposed weight, x being `[rows, 2 * in]`, rows `gate | up`; the rest as in
    `product`."""
    rows, size = x.shape[0], x.shape[1] // 2
    inner = x.new_empty(rows, size)
    swiglu[(rows, ceil_div(size, SWIGLU_BLOCK))](x, inner, size, block=SWIGLU_BLOCK)
    return _add(inner, weight, residual)


def _add(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    return torch.mm(x, weight.t()) if residual is None else residual.addmm_(x, weight.t())
