"""The dense feed-forward."""

import torch.nn.functional as F
from torch import Tensor, nn

from modeling.spec import MLPSpec


class MLP(nn.Module):
    """SwiGLU with a fused gate and up projection, rows `gate | up`."""

    def __init__(self, spec: MLPSpec, hidden_size: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, 2 * spec.intermediate_size, bias=False)
        self.out_proj = nn.Linear(spec.intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.in_proj(x).chunk(2, dim=-1)
        y: Tensor = self.out_proj(F.silu(gate) * up)
        return y
