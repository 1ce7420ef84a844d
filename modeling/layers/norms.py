"""Norms: of hidden states, of heads, and of keys and queries."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.ops import wide

L2_EPS = 1e-6


def l2_normalise(x: Tensor) -> Tensor:
    """`x / sqrt(sum(x^2) + 1e-6)` over the last axis, as fla's kernels compute it (eps inside the root)."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a plain weight, computed in float32 and returned in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        return F.rms_norm(y, y.shape[-1:], self.weight.to(y.dtype), self.eps).to(x.dtype)
