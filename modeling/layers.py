"""Plain torch modules of a linear-attention block, over packed tokens.

`forward` is the sequence form (training, calibration, evaluation, prefill); `decode` is one token of each of B
requests, in place on the state pool. Projections run in the parameters' dtype; norms, gates, decay and the recurrence
in float32 (float64 where the parameters are).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.ops import GatedDeltaRule, reference_step, wide
from modeling.spec import LayerSpec, MixerSpec

L2_EPS = 1e-6

Tap = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Called in each mixer as `tap(layer, x, q, k)` with the mixer's input `[tokens, hidden]` and the post-convolution,
pre-normalisation q and k `[tokens, num_k_heads, d_k]`; what it returns is used as q and k. Statistics observe through
it, masks and gates act through it."""


def l2_normalise(x: Tensor) -> Tensor:
    """`x / sqrt(sum(x^2) + 1e-6)` over the last axis, as fla's kernels compute it (eps inside the root)."""
    x = wide(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a plain weight, computed in float32 and returned in the input's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = wide(x)
        return F.rms_norm(y, y.shape[-1:], self.weight.to(y.dtype), self.eps).to(x.dtype)


class ShortConv(nn.Module):
    """Causal depthwise convolution over packed sequences, then SiLU. Weight `[channels, kernel]`."""

    def __init__(self, channels: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, x: Tensor, cu_seqlens: Sequence[int], state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x `[tokens, channels]`, state `[sequences, channels, kernel - 1]` (the inputs before x; None for zeros).

        Returns y like x and the new state.
        """
        channels, kernel = self.weight.shape
        history = kernel - 1
        sequences = len(cu_seqlens) - 1
        before = (
            x.new_zeros(sequences, history, channels) if state is None else state.transpose(1, 2).to(x.dtype)
        )
        # Each sequence with its history in front, one after the other; the rows at the seams are then left out.
        # split, not slices: the backward of a slice writes a zero tensor of the whole size.
        lengths = [b - a for a, b in itertools.pairwise(cu_seqlens)]
        pieces = zip(before.unbind(), x.split(lengths), strict=True)
        buffer = torch.cat([piece for pair in pieces for piece in pair])
        inputs, weight = wide(buffer), wide(self.weight)
        length = buffer.shape[0] - history
        y = inputs[:length] * weight[:, 0]
        for j in range(1, kernel):
            y = torch.addcmul(y, inputs[j : j + length], weight[:, j])
        if sequences > 1:
            seams = [n for length in lengths for n in (length, history)][:-1]
            y = torch.cat(y.split(seams)[::2])
        if self.bias is not None:
            y = y + self.bias
        ends = [cu_seqlens[i + 1] + (i + 1) * history for i in range(sequences)]
        last = torch.stack([buffer[end - history : end] for end in ends])
        return F.silu(y).to(x.dtype), last.transpose(1, 2)

    def decode(self, x: Tensor, pool: Tensor, slots: Tensor) -> Tensor:
        """x `[B, channels]`, pool `[slots, channels, kernel - 1]` updated in place at `slots` `[B]`."""
        window = torch.cat([pool[slots].to(x.dtype), x[..., None]], dim=-1)
        pool[slots] = window[..., 1:].to(pool.dtype)
        y = (wide(window) * wide(self.weight)).sum(-1)
        if self.bias is not None:
            y = y + self.bias
        return F.silu(y).to(x.dtype)


class Mixer(nn.Module):
    """(Gated) delta rule token mixer with one fused input projection, rows `q | k | v | gate | beta | decay`."""

    def __init__(self, spec: MixerSpec, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.layer = layer
        self.in_proj = nn.Linear(hidden_size, sum(spec.in_proj_sizes), bias=False)
        self.conv = ShortConv(spec.conv_channels, spec.conv_kernel, spec.conv_bias)
        if spec.has_decay:
            self.A_log = nn.Parameter(torch.empty(spec.num_v_heads))
            self.dt_bias = nn.Parameter(torch.empty(spec.num_v_heads))
        self.o_norm = RMSNorm(spec.d_v, spec.norm_eps)
        self.o_proj = nn.Linear(spec.value_dim, hidden_size, bias=False)

    def _gates(self, beta_in: Tensor, decay_in: Tensor) -> tuple[Tensor, Tensor | None]:
        """beta and the log decay g, `[tokens, num_v_heads]`."""
        s = self.spec
        if s.has_beta:
            beta = wide(beta_in).sigmoid() * s.beta_scale
        else:
            beta = wide(beta_in.new_ones(beta_in.shape[0], s.num_v_heads)) * s.beta_scale
        if not s.has_decay:
            return beta, None
        decay = wide(decay_in)
        g = -self.A_log.to(decay.dtype).exp() * F.softplus(decay + self.dt_bias.to(decay.dtype))
        return beta, g

    def _normed(self, o: Tensor, gate: Tensor) -> Tensor:
        """Gated RMSNorm of o `[tokens, num_v_heads, d_v]` -> `[tokens, value_dim]` in the gate's dtype."""
        o = self.o_norm(o)
        if self.spec.gate != "none":
            activation = F.silu if self.spec.gate == "silu" else torch.sigmoid
            o = o * activation(wide(gate)).view_as(o)
        return o.flatten(1).to(gate.dtype)

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        s = self.spec
        q, k, v = qkv.split([s.key_dim, s.key_dim, s.value_dim], dim=-1)
        return q.unflatten(-1, (-1, s.d_k)), k.unflatten(-1, (-1, s.d_k)), v.unflatten(-1, (-1, s.d_v))

    def inputs(
        self,
        qkv: Tensor,
        cu_seqlens: Sequence[int],
        state: Tensor | None,
        between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`MixerInputs` in plain torch operations, on any device; differentiable. `between` replaces q and k before
        they are normalised."""
        qkv, state = self.conv(qkv, cu_seqlens, state)
        q, k, v = self._split_heads(qkv)
        if between is not None:
            q, k = between(q, k)
        return l2_normalise(q), l2_normalise(k), v, state

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Sequence[int],
        recurrent: Tensor | None,
        conv: Tensor | None,
        rule: GatedDeltaRule,
        tap: Tap | None,
        inputs: "MixerInputs | None" = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x `[tokens, hidden]` -> output like x, recurrent and convolution state of each sequence."""
        qkv, gate, beta_in, decay_in = self.in_proj(x).split(self.spec.in_proj_sizes, dim=-1)
        if tap is None:
            q, k, v, conv = (inputs or Mixer.inputs)(self, qkv, cu_seqlens, conv)
        else:
            q, k, v, conv = self.inputs(qkv, cu_seqlens, conv, lambda q, k: tap(self.layer, x, q, k))
        beta, g = self._gates(beta_in, decay_in)
        o, recurrent = rule(
            q,
            k,
            v,
            g,
            beta,
            scale=self.spec.d_k**-0.5,
            cu_seqlens=cu_seqlens,
            initial_state=recurrent,
        )
        return self.o_proj(self._normed(o, gate)), recurrent, conv

    def step(self, projected: Tensor, recurrent: Tensor, conv: Tensor, slots: Tensor) -> Tensor:
        """`MixerStep` in plain torch operations, on any device."""
        qkv, gate, beta_in, decay_in = projected.split(self.spec.in_proj_sizes, dim=-1)
        q, k, v = self._split_heads(self.conv.decode(qkv, conv, slots))
        beta, g = self._gates(beta_in, decay_in)
        o, state = reference_step(
            wide(recurrent[slots]),
            l2_normalise(q),
            l2_normalise(k),
            wide(v),
            g,
            beta,
            scale=self.spec.d_k**-0.5,
        )
        recurrent[slots] = state.to(recurrent.dtype)
        return self._normed(o, gate)


class MixerStep(Protocol):
    """One token of each of B requests through a mixer, between its input and its output projection.

    Convolution, SiLU, L2 norms, gates, state update, read-out and gated RMSNorm. States move on in place.

    Args:
        mixer: whose spec and parameters to use.
        projected: the input projection's output, `[B, sum(in_proj_sizes)]`, rows `q | k | v | gate | beta | decay`.
        recurrent: the layer's pool, `[slots, num_v_heads, d_k, d_v]`.
        conv: the layer's pool, `[slots, conv_channels, conv_kernel - 1]`.
        slots: int64 `[B]`, distinct.

    Returns:
        The output projection's input, `[B, value_dim]`, in `projected`'s dtype.
    """

    def __call__(
        self, mixer: Mixer, projected: Tensor, recurrent: Tensor, conv: Tensor, slots: Tensor, /
    ) -> Tensor: ...


class MixerInputs(Protocol):
    """What a mixer's rule reads, of packed sequences: convolution, SiLU, heads and L2 norms.

    Args:
        mixer: whose spec and parameters to use.
        qkv: of the input projection's output, `[tokens, conv_channels]`.
        cu_seqlens: offsets of the packed sequences.
        state: `[sequences, conv_channels, conv_kernel - 1]`, the inputs before these; None for zeros.

    Returns:
        q and k `[tokens, num_k_heads, d_k]`, normalised, v `[tokens, num_v_heads, d_v]`, and the new state.
    """

    def __call__(
        self, mixer: Mixer, qkv: Tensor, cu_seqlens: Sequence[int], state: Tensor | None, /
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...


class MLP(nn.Module):
    """SwiGLU with a fused gate and up projection, rows `gate | up`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.out_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.in_proj(x).chunk(2, dim=-1)
        y: Tensor = self.out_proj(F.silu(gate) * up)
        return y


class Block(nn.Module):
    """Pre-norm block: x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, spec: LayerSpec, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(hidden_size, spec.norm.eps)
        self.mixer = Mixer(spec.mixer, hidden_size, layer)
        self.mlp_norm = RMSNorm(hidden_size, spec.norm.eps)
        self.mlp = MLP(hidden_size, spec.mlp.intermediate_size)

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Sequence[int],
        recurrent: Tensor | None,
        conv: Tensor | None,
        rule: GatedDeltaRule,
        tap: Tap | None,
        inputs: MixerInputs | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, recurrent, conv = self.mixer(self.mixer_norm(x), cu_seqlens, recurrent, conv, rule, tap, inputs)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), recurrent, conv

    def decode(self, x: Tensor, recurrent: Tensor, conv: Tensor, slots: Tensor, step: MixerStep) -> Tensor:
        mixer = self.mixer
        x = x + mixer.o_proj(step(mixer, mixer.in_proj(self.mixer_norm(x)), recurrent, conv, slots))
        y: Tensor = self.mlp(self.mlp_norm(x))
        return x + y


class BlockStep(Protocol):
    """One token of each of B requests through a block, given the mixer's step: as `Block.decode`.

    x `[B, hidden]` may be overwritten.
    """

    def __call__(
        self, block: Block, x: Tensor, recurrent: Tensor, conv: Tensor, slots: Tensor, step: MixerStep, /
    ) -> Tensor: ...
