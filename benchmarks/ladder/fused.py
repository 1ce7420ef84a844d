"""Training on a CUDA card: a model's forward by flash-linear-attention's fused kernels, differentiable, in bfloat16.

`modeling.Model` computes packed sequences in plain torch, on any device; here all sequences are of one length, so that
convolution, gated delta rule and gated norm are one kernel each. `check` compares the two on random tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import pruning.fused
from modeling.layers import Block, DeltaMixer
from modeling.layers.mlp import MLP
from modeling.model import Model
from pruning.fused import chunk_rule


def compile_parts() -> None:
    """Compile what stands between the matrix products and fla's kernels, for inputs of one shape."""
    for name in ("weigh", "combine"):
        setattr(pruning.fused, name, torch.compile(getattr(pruning.fused, name), dynamic=False))
    for name in ("_project", "_feed_forward"):
        globals()[name] = torch.compile(globals()[name], dynamic=False)


def hidden_states(model: Model, ids: Tensor) -> Tensor:
    """Hidden states after the final norm, `[batch, window, hidden]`, of sequences int64 `[batch, window]`."""
    x = model.embeddings(ids)
    for block in model.blocks:
        mixer = block.mixer
        if isinstance(mixer, DeltaMixer):
            # Beta and decay by themselves: with their few rows more the large product would be half as fast.
            s = mixer.spec
            many = s.conv_channels + s.in_proj_sizes[1]
            parts = mixer.in_proj.weight.split([many, sum(s.in_proj_sizes) - many])
            x = x + _delta(mixer, *_project(x, block.mixer_norm.weight, block.mixer_norm.eps, *parts))
        else:
            x = x + _packed(block, block.mixer_norm(x))
        ffn = block.ffn
        assert isinstance(ffn, MLP)
        x = _feed_forward(
            x, block.ffn_norm.weight, block.ffn_norm.eps, ffn.in_proj.weight, ffn.out_proj.weight
        )
    return model.norm(x)


def _project(x: Tensor, norm: Tensor, eps: float, many: Tensor, few: Tensor) -> tuple[Tensor, Tensor]:
    """The products of a normed input with two matrices."""
    h = F.rms_norm(x, x.shape[-1:], norm, eps)
    return F.linear(h, many), F.linear(h, few)


def _feed_forward(x: Tensor, norm: Tensor, eps: float, into: Tensor, out: Tensor) -> Tensor:
    """A SwiGLU with its norm before and its residual."""
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], norm, eps), into).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, out)


def _packed(block: Block, h: Tensor) -> Tensor:
    """A mixer of another kind, in torch."""
    batch, window, size = h.shape
    y, _ = block.mixer(h.flatten(0, 1), range(0, batch * window + 1, window))
    return y.view(batch, window, size)


def _delta(mixer: DeltaMixer, many: Tensor, few: Tensor) -> Tensor:
    """A (gated) delta rule mixer, of its input projection's rows q|k|v|gate and beta|decay."""
    from fla.modules.causal_conv1d import causal_conv1d
    from fla.modules.norm.fused_norm_gate import rms_norm_gated

    s = mixer.spec
    qkv, gate = many.split(s.in_proj_sizes[:2], dim=-1)
    qkv, _ = causal_conv1d(qkv, mixer.conv.weight, mixer.conv.bias, activation="silu")
    q, k, v = qkv.split([s.key_dim, s.key_dim, s.value_dim], dim=-1)
    beta, g = mixer.gates(*few.split(s.in_proj_sizes[2:], dim=-1))
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
    return mixer.o_proj(o.flatten(2).to(many.dtype))


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
