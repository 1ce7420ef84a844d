"""Training on a CUDA card: a model's forward by flash-linear-attention's fused kernels, differentiable, in bfloat16.

`modeling.Model` computes packed sequences in plain torch, on any device; here all sequences are of one length, so that
convolution, gated delta rule and gated norm are one kernel each. `check` compares the two on random tokens.
"""

import torch
from torch import Tensor

from modeling.layers import Block, DeltaMixer
from modeling.model import Model


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
