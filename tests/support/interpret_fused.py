"""Run the ladder's fused forward and backward by Triton's interpreter, and print how far they are from plain torch.

As a script of its own, with a copy of fla in front of the path: the interpreter can't run its kernels as they are.
"""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "ladder"))

import fused
import torch
from models import delta_net, gated_deltanet, initialise
from triton.runtime.autotuner import Autotuner

from modeling.families import family_of
from modeling.model import Model
from pruning.fused import fix_configurations, fla_gated_delta_rule

fix_configurations()

# Tuning asks for a driver; any configuration will do here.
Autotuner._bench = lambda *_, **__: [0.0, 0.0, 0.0]
BATCH, WINDOW, VOCABULARY = 2, 96, 64


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm().detach() / expected.norm().detach().clamp(min=1e-9))


def gradients(model: Model, hidden: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (hidden * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


for config in (gated_deltanet(64, 1, 1, 64, d_k=32), delta_net(64, 1, 2, 64, d_k=32, d_v=32)):
    torch.manual_seed(0)
    model = Model(family_of(config).spec({**config, "vocab_size": VOCABULARY}))
    initialise(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "conv" not in name:
                p.mul_(10)  # so that every part of a layer matters to its output
    ids = torch.randint(VOCABULARY, (BATCH, WINDOW))
    offsets = range(0, BATCH * WINDOW + 1, WINDOW)
    expected, _ = model(ids.flatten(), offsets)
    weights = torch.randn_like(expected)
    wanted = gradients(model, expected, weights)
    found = fused.hidden_states(model, ids).flatten(0, 1)
    other = gradients(model, found, weights)
    ruled, _ = model(ids.flatten(), (0, 70, 192), rule=fla_gated_delta_rule)
    plain, _ = model(ids.flatten(), (0, 70, 192))
    wanted_ruled, other_ruled = gradients(model, plain, weights), gradients(model, ruled, weights)
    assert wanted.keys() == other.keys()
    print(config["model_type"], "forward", distance(found, expected))
    print(config["model_type"], "gradients", max(distance(other[name], wanted[name]) for name in wanted))
    print(config["model_type"], "rule", distance(ruled, plain))
    worst = max(distance(other_ruled[name], wanted_ruled[name]) for name in wanted_ruled)
    print(config["model_type"], "rule_gradients", worst)
