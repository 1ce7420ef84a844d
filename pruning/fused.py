"""The gated delta rule for training on a CUDA card, by flash-linear-attention's kernels and their backward.

`chunked_gated_delta_rule` takes a few dozen launches for each chunk of a sequence; these kernels take fifteen for all
sequences together, forward and backward.
"""

import json
import os
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from modeling.ops import GatedDeltaRule, RuleInputs

HOPPER = (9, 0)
"""The compute capability of the cards that `CONFIGS` is for."""
CONFIGS = {
    "chunk_local_cumsum_scalar_kernel": ({}, 1, 3),
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": ({"BK": 64}, 1, 3),
    "recompute_w_u_fwd_kernel": ({}, 4, 3),
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": ({"BV": 32}, 4, 2),
    "chunk_fwd_kernel_o": ({"BK": 64, "BV": 64}, 4, 3),
    "chunk_bwd_kernel_dv_local": ({}, 4, 3),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": ({"BV": 32}, 4, 2),
    "chunk_bwd_kernel_dqkwg": ({}, 4, 2),
    "prepare_wy_repr_bwd_kernel": ({}, 4, 2),
    "l2norm_fwd_kernel": ({"BT": 32}, 4, 3),
    "l2norm_bwd_kernel": ({"BT": 32}, 4, 3),
    "causal_conv1d_fwd_kernel": ({"BD": 64}, 4, 3),
    "causal_conv1d_bwd_kernel": ({"BD": 64}, 8, 3),
}
"""Kernels of fla, and what each is launched with on a Hopper card: its own constants, its warps, its stages. fla would
tune each of them at its first launch, which takes minutes."""


def training_rule(device: torch.device) -> GatedDeltaRule | None:
    """The rule to train with on a device: fla's on a card for which it is installed; None for plain torch."""
    if device.type != "cuda" or find_spec("fla") is None:
        return None
    if torch.cuda.get_device_capability(device) == HOPPER:
        fix_configurations()
    return fla_gated_delta_rule


@cache
def fix_configurations() -> None:
    """Tell fla `CONFIGS`, in files of its own format. Call this first: fla asks where they are when it is imported."""
    folder = Path(tempfile.mkdtemp(prefix="fla-configs-"))
    for name, (constants, warps, stages) in CONFIGS.items():
        config = {"kwargs": constants, "num_warps": warps, "num_stages": stages, "num_ctas": 1}
        (folder / f"{name}.json").write_text(json.dumps({"kernel_name": name, "default_config": config}))
    os.environ["FLA_CONFIG_DIR"], os.environ["FLA_CACHE_MODE"] = str(folder), "default"


def fla_gated_delta_rule(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """`modeling.ops.GatedDeltaRule` by fla's kernels with their backward, in v's dtype."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    v = inputs.v[None]
    q, k = (t.to(v.dtype)[None] for t in (inputs.q, inputs.k))
    beta = inputs.beta[None]
    g = torch.zeros_like(beta) if inputs.g is None else inputs.g[None]
    o, state = chunk_gated_delta_rule(
        q,
        k,
        v,
        g,
        beta,
        scale=inputs.scale,
        initial_state=inputs.initial_state,
        output_final_state=True,
        cu_seqlens=torch.tensor(inputs.cu_seqlens, device=v.device),
    )
    return o[0], state
