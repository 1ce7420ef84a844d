"""The dense feed-forward with SwiGLU."""

from torch import Tensor

from modeling.layers import MLP, RMSNorm
from modeling.runtime.gpu.products import gated_product, product


def add_mlp(mlp: MLP, x: Tensor, norm: RMSNorm | None, residual: Tensor | None) -> Tensor:
    """The feed-forward of x `[rows, hidden]`, added to the residual, as `modeling.runtime.gpu.runtime` says."""
    return product(gated_product(x, mlp.in_proj.weight, norm), mlp.out_proj.weight, residual=residual)
