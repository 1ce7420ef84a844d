"""The dense feed-forward with SwiGLU as one Triton kernel and the residual sum inside a product."""

from torch import Tensor

from modeling.layers import MLP
from modeling.runtime.gpu.kernels.mlp import swiglu
from modeling.runtime.gpu.sizes import ceil_div

BLOCK = 1024
"""Columns that a program of the kernel takes at a time."""


def add_mlp(mlp: MLP, x: Tensor, normed: Tensor) -> Tensor:
    """x `[rows, hidden]` plus the feed-forward of `normed`, in x's memory."""
    z = mlp.in_proj(normed)
    rows, size = z.shape[0], z.shape[1] // 2
    out = z.new_empty(rows, size)
    swiglu[(rows, ceil_div(size, BLOCK))](z, out, size, block=BLOCK)
    return x.addmm_(out, mlp.out_proj.weight.t())
