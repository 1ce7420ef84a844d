"""Independent forward pass of fla checkpoints, built on the naive functions that fla ships. Runs no Triton kernel.

It reads the checkpoint's own tensor names and config, and shares no code with `modeling`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.gate import naive_gdn_gate
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from torch import Tensor


def _rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _l2(x: Tensor) -> Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv1d(x.transpose(1, 2), weight, bias, padding=weight.shape[-1] - 1, groups=len(weight))
    return F.silu(y[..., : x.shape[1]].transpose(1, 2))


def _mixer(sd: dict[str, Tensor], p: str, c: dict[str, Any], x: Tensor, output_eps: float) -> Tensor:
    q, k, v = (
        _conv(
            F.linear(x, sd[f"{p}{n}_proj.weight"]),
            sd[f"{p}{n}_conv1d.weight"],
            sd.get(f"{p}{n}_conv1d.bias"),
        )
        for n in "qkv"
    )
    heads = c["num_heads"]
    v_heads = c.get("num_v_heads") or heads
    q, k, v = (
        _l2(q.unflatten(-1, (heads, -1))),
        _l2(k.unflatten(-1, (heads, -1))),
        v.unflatten(-1, (v_heads, -1)),
    )
    if f"{p}b_proj.weight" in sd:
        beta = F.linear(x, sd[f"{p}b_proj.weight"]).sigmoid()
    else:
        beta = torch.ones(*x.shape[:2], v_heads, dtype=x.dtype)
    if c.get("allow_neg_eigval"):
        beta = beta * 2
    if c["model_type"] == "delta_net":
        o, _ = delta_rule_recurrence(*(t.transpose(1, 2) for t in (q, k, v, beta)))
        o = o.transpose(1, 2)
    else:
        g = naive_gdn_gate(F.linear(x, sd[f"{p}a_proj.weight"]), sd[f"{p}A_log"], sd[f"{p}dt_bias"])
        q, k = (t.repeat_interleave(v_heads // heads, 2) for t in (q, k))
        o, _ = naive_recurrent_gated_delta_rule(q, k, v, beta, g)
    o = _rms(o, sd[f"{p}o_norm.weight"], output_eps)
    if f"{p}g_proj.weight" in sd:
        activation = torch.sigmoid if c.get("output_gate_activation") == "sigmoid" else F.silu
        o = o * activation(F.linear(x, sd[f"{p}g_proj.weight"])).unflatten(-1, (v_heads, -1))
    return F.linear(o.flatten(-2), sd[f"{p}o_proj.weight"])


def fla_logits(
    sd: dict[str, Tensor], config: dict[str, Any], input_ids: Tensor, *, output_eps_factor: float = 1.0
) -> Tensor:
    """Logits `[batch, tokens, vocab]` of an fla state dict, in float32 or, where that is float64, in float64;
    `output_eps_factor` scales the output norms' eps only."""
    sd = {name: t if t.dtype == torch.float64 else t.float() for name, t in sd.items()}
    eps = config.get("norm_eps", 1e-6)
    x = F.embedding(input_ids, sd["model.embeddings.weight"])
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        y = _rms(x, sd[f"{p}attn_norm.weight"], eps)
        x = x + _mixer(sd, f"{p}attn.", config, y, eps * output_eps_factor)
        y = _rms(x, sd[f"{p}mlp_norm.weight"], eps)
        gate, up = F.linear(y, sd[f"{p}mlp.gate_proj.weight"]), F.linear(y, sd[f"{p}mlp.up_proj.weight"])
        x = x + F.linear(F.silu(gate) * up, sd[f"{p}mlp.down_proj.weight"])
    return F.linear(
        _rms(x, sd["model.norm.weight"], eps), sd.get("lm_head.weight", sd["model.embeddings.weight"])
    )
