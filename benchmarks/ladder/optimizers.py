"""The optimisers that the ladder's models are trained with."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from modeling.model import Model

MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Muon (https://kellerjordan.github.io/posts/muon) with AdamW's step sizes (arXiv 2502.16982), as torch.optim.Muon
    computes it, but for all matrices of one shape together: that one takes some hundred launches for each matrix."""

    def __init__(self, matrices: Sequence[nn.Parameter], lr: float, weight_decay: float) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for p in matrices:
            by_shape.setdefault(p.shape, []).append(p)
        super().__init__(
            [{"params": own} for own in by_shape.values()], {"lr": lr, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = group["params"]
            gradients = torch.stack([p.grad for p in parameters])
            momentum = self.state[parameters[0]].setdefault("momentum", torch.zeros_like(gradients))
            momentum.lerp_(gradients, 1 - MOMENTUM)
            updates = orthogonal(gradients.lerp(momentum, MOMENTUM))
            rate = group["lr"] * 0.2 * math.sqrt(max(gradients.shape[1:]))
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, updates.to(gradients.dtype).unbind(), alpha=-rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices `[n, rows, columns]` with singular values of about 1, by Newton and Schulz in bfloat16."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def optimizers(model: Model, lr: float, *, other_decay: float = 0.1) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for all else, with a weight decay of `other_decay` for its own matrices."""
    matrices = [p for n, p in model.layers.named_parameters() if n.endswith("proj.weight")]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(matrices, lr, weight_decay=0.1),
        torch.optim.AdamW(
            [
                {"params": [p for p in others if p.ndim >= 2], "weight_decay": other_decay},
                {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=lr,
            betas=(0.9, 0.95),
            fused=model.device.type == "cuda",
        ),
    ]
