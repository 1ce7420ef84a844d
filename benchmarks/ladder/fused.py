"""Training on a CUDA card: a model's forward by flash-linear-attention's fused kernels, differentiable, in bfloat16.

`modeling.Model` computes packed sequences in plain torch, on any device; here all sequences are of one length, so that
convolution, gated delta rule and gated norm are one kernel each. `check` compares the two on random tokens.
"""

import json
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from modeling.layers import Block, DeltaMixer
from modeling.model import Model
from modeling.ops import RuleInputs

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
"""Kernels of fla, and what each is launched with on a Hopper card: (its own constants, warps, stages). fla would tune
each of them at its first launch, which takes minutes."""


def fix_configurations() -> None:
    """Tell fla `CONFIGS`, in files of its own format. Call this first: fla asks where they are when it is imported."""
    folder = Path(tempfile.mkdtemp(prefix="fla-configs-"))
    for name, (constants, warps, stages) in CONFIGS.items():
        config = {"kwargs": constants, "num_warps": warps, "num_stages": stages, "num_ctas": 1}
        (folder / f"{name}.json").write_text(json.dumps({"kernel_name": name, "default_config": config}))
    os.environ["FLA_CONFIG_DIR"], os.environ["FLA_CACHE_MODE"] = str(folder), "default"


def rule(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """`modeling.ops.GatedDeltaRule` by fla's kernels with their backward, in bfloat16."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v = (t.to(torch.bfloat16)[None] for t in (inputs.q, inputs.k, inputs.v))
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


def hidden_states(model: Model, ids: Tensor) -> Tensor:
    """Hidden states after the final norm, `[batch, window, hidden]`, of sequences int64 `[batch, window]`."""
    x = model.embeddings(ids)
    for block in model.blocks:
        h = block.mixer_norm(x)
        x = x + (_delta(block.mixer, h) if isinstance(block.mixer, DeltaMixer) else _packed(block, h))
        x = x + block.ffn(block.ffn_norm(x))
    return model.norm(x)


def _packed(block: Block, h: Tensor) -> Tensor:
    """A mixer of another kind, in torch."""
    batch, window, size = h.shape
    y, _ = block.mixer(h.flatten(0, 1), range(0, batch * window + 1, window))
    return y.view(batch, window, size)


def _delta(mixer: DeltaMixer, h: Tensor) -> Tensor:
    """A (gated) delta rule mixer, of normed inputs `[batch, window, hidden]`."""
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    s = mixer.spec
    qkv, gate, beta_in, decay_in = mixer.in_proj(h).split(s.in_proj_sizes, dim=-1)
    qkv, _ = causal_conv1d(qkv, mixer.conv.weight, mixer.conv.bias, activation="silu")
    q, k, v = qkv.split([s.key_dim, s.key_dim, s.value_dim], dim=-1)
    beta, g = mixer.gates(beta_in, decay_in)
    o, _ = chunk_gated_delta_rule(
        q.unflatten(-1, (-1, s.d_k)).contiguous(),
        k.unflatten(-1, (-1, s.d_k)).contiguous(),
        v.unflatten(-1, (-1, s.d_v)).contiguous(),
        torch.zeros_like(beta) if g is None else g,
        beta,
        use_qk_l2norm_in_kernel=True,
    )
    if s.gate == "silu":
        o = rms_norm_gated(o, gate.unflatten(-1, (-1, s.d_v)), mixer.o_norm.weight, None, eps=s.norm_eps)
    else:
        o = mixer.o_norm(o)
    return mixer.o_proj(o.flatten(2).to(h.dtype))


@torch.no_grad()
def check(model: Model, *, window: int = 256, tolerance: float = 0.05) -> float:
    """How far `hidden_states` in bfloat16 are from the model's own forward in float32, over the norm of these.

    Raises:
        AssertionError: they are further off than bfloat16 explains.
    """
    ids = torch.randint(model.spec.vocab_size, (4, window), device=model.device)
    expected, _ = model(ids.flatten(), range(0, ids.numel() + 1, window))
    with torch.autocast("cuda", torch.bfloat16):
        found = hidden_states(model, ids)
    distance = float((found.flatten(0, 1).float() - expected).norm() / expected.norm())
    assert distance < tolerance, f"the fused forward is {distance:.3f} off"
    return distance
