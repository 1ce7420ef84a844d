"""Training on a CUDA card: a model's forward by flash-linear-attention's fused kernels, differentiable, in bfloat16.

`modeling.Model` computes packed sequences in plain torch, on any device; here all sequences are of one length, so that
convolution, gated delta rule and gated norm are one kernel each. `check` compares the two on random tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from modeling.layers import Block, DeltaMixer
from modeling.model import Model
from pruning.fused import chunk_rule


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

    s = mixer.spec
    qkv, gate, beta_in, decay_in = mixer.in_proj(h).split(s.in_proj_sizes, dim=-1)
    qkv, _ = causal_conv1d(qkv, mixer.conv.weight, mixer.conv.bias, activation="silu")
    q, k, v = qkv.split([s.key_dim, s.key_dim, s.value_dim], dim=-1)
    beta, g = mixer.gates(beta_in, decay_in)
    o, _ = chunk_rule()(
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


def check(model: Model, *, window: int = 256) -> dict[str, float]:
    """How far hidden states and gradients of `hidden_states` are from plain torch's in float32, over their norms.

    Raises:
        AssertionError: they are further off than twice as far as plain torch in bfloat16.
    """
    ids = torch.randint(model.spec.vocab_size, (4, window), device=model.device)
    weights = torch.randn(ids.numel(), model.spec.hidden_size, device=model.device)

    def plain() -> Tensor:
        return model(ids.flatten(), range(0, ids.numel() + 1, window))[0]

    def outcome(run: Callable[[], Tensor], *, narrow: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=narrow):
            hidden = run().flatten(0, -2).float()
        (hidden * weights).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return hidden.detach(), gradients

    exact = outcome(plain, narrow=False)
    narrow = outcome(plain, narrow=True)
    found = outcome(lambda: hidden_states(model, ids), narrow=True)
    distances = {}
    for i, what in enumerate(("hidden", "gradients")):
        allowed, distance = (float((x[i] - exact[i]).norm() / exact[i].norm()) for x in (narrow, found))
        distances |= {what: distance, f"plain_{what}": allowed}
        assert distance < 2 * allowed, (
            f"{what} of the fused forward are {distance:.3f} off, plain ones {allowed:.3f}"
        )
    return distances
