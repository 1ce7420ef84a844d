"""The mixture of experts."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.layers.mlp import MLP
from modeling.ops import wide
from modeling.spec import MLPSpec, MoESpec


class MoE(nn.Module):
    """Routed SwiGLU experts and one that all tokens take, in plain torch: from expert to expert, those that are hit.

    The experts' matrices may be in a narrower dtype than the rest: each is widened when it is used.
    """

    def __init__(self, spec: MoESpec, hidden_size: int) -> None:
        super().__init__()
        self.spec = spec
        self.router = nn.Linear(hidden_size, spec.num_experts, bias=False)
        self.in_proj = nn.Parameter(torch.empty(spec.num_experts, 2 * spec.expert_size, hidden_size))
        """Rows `gate | up` of each expert."""
        self.out_proj = nn.Parameter(torch.empty(spec.num_experts, hidden_size, spec.expert_size))
        self.shared = MLP(MLPSpec(spec.shared_size), hidden_size)
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[tokens, hidden]` -> output like it."""
        chances = wide(self.router(x)).softmax(-1)
        weights, experts = chances.topk(self.spec.top_k, dim=-1)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        y: Tensor = self.shared(x) * self.shared_gate(x).sigmoid()
        for e in experts.unique().tolist():
            token, choice = (experts == e).nonzero(as_tuple=True)
            gate, up = F.linear(x[token], self.in_proj[e].to(x.dtype)).chunk(2, dim=-1)
            of_expert = F.linear(F.silu(gate) * up, self.out_proj[e].to(x.dtype))
            weighted = of_expert * weights[token, choice, None]
            y = y.index_add(0, token, weighted.to(y.dtype))  # in autocast products are narrower than weights
        return y
