"""The (gated) delta rule mixer."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.layers.conv import ShortConv
from modeling.layers.mixer import Mixer
from modeling.layers.norms import RMSNorm, l2_normalise
from modeling.ops import GatedDeltaRule, RuleInputs, chunked_gated_delta_rule, reference_step, wide
from modeling.spec import DeltaSpec
from modeling.state import DeltaState, LayerState, SequenceState

Tap = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Called in each linear layer as `tap(layer, x, q, k)` with the layer's index in the model, the mixer's input
`[tokens, hidden]` and the post-convolution, pre-normalisation q and k `[tokens, num_k_heads, d_k]`; what it returns is
used as q and k. Statistics observe through it, masks and gates act through it."""


class DeltaMixer(Mixer):
    """(Gated) delta rule token mixer with one fused input projection, rows `q | k | v | gate | beta | decay`."""

    def __init__(self, spec: DeltaSpec, hidden_size: int, layer: int) -> None:
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

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """The parts of the input projection of x `[tokens, hidden]`: q|k|v, gate, beta and decay (`in_proj_sizes`)."""
        projected: Tensor = self.in_proj(x)
        return tuple(projected.split(self.spec.in_proj_sizes, dim=-1))

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k `[tokens, num_k_heads, d_k]` and v `[tokens, num_v_heads, d_v]` of `[tokens, conv_channels]`."""
        s = self.spec
        q, k, v = qkv.split([s.key_dim, s.key_dim, s.value_dim], dim=-1)
        return q.unflatten(-1, (-1, s.d_k)), k.unflatten(-1, (-1, s.d_k)), v.unflatten(-1, (-1, s.d_v))

    def gates(self, beta_in: Tensor, decay_in: Tensor) -> tuple[Tensor, Tensor | None]:
        """beta and the log decay g, `[tokens, num_v_heads]`; g is None without decay."""
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

    def gated_norm(self, o: Tensor, gate: Tensor) -> Tensor:
        """Gated RMSNorm of o `[tokens, num_v_heads, d_v]` -> `[tokens, value_dim]` in the gate's dtype."""
        o = self.o_norm(o)
        if self.spec.gate != "none":
            activation = F.silu if self.spec.gate == "silu" else torch.sigmoid
            o = o * activation(wide(gate)).view_as(o)
        return o.flatten(1).to(gate.dtype)

    def heads(
        self,
        qkv: Tensor,
        cu_seqlens: Sequence[int],
        state: Tensor | None,
        between: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the rule reads of packed sequences: convolution, SiLU, heads and L2 norms of q|k|v
        `[tokens, conv_channels]`. `between` replaces q and k before they are normalised.

        Returns:
            q and k `[tokens, num_k_heads, d_k]`, normalised, v `[tokens, num_v_heads, d_v]`, and the convolution's new
            state.
        """
        qkv, state = self.conv(qkv, cu_seqlens, state)
        q, k, v = self.split_heads(qkv)
        if between is not None:
            q, k = between(q, k)
        return l2_normalise(q), l2_normalise(k), v, state

    def forward(
        self,
        x: Tensor,
        cu_seqlens: Sequence[int],
        state: SequenceState | None = None,
        *,
        rule: GatedDeltaRule | None = None,
        tap: Tap | None = None,
    ) -> tuple[Tensor, DeltaState]:
        assert state is None or isinstance(state, DeltaState)
        qkv, gate, beta_in, decay_in = self.project(x)
        between = None if tap is None else partial(tap, self.layer, x)
        q, k, v, conv = self.heads(qkv, cu_seqlens, None if state is None else state.conv, between)
        beta, g = self.gates(beta_in, decay_in)
        recurrent = None if state is None else state.recurrent
        inputs = RuleInputs(q, k, v, g, beta, self.spec.d_k**-0.5, cu_seqlens, recurrent)
        o, recurrent = (rule or chunked_gated_delta_rule)(inputs)
        return self.o_proj(self.gated_norm(o, gate)), DeltaState(recurrent, conv)

    def decode(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        assert isinstance(state, DeltaState)
        y: Tensor = self.o_proj(self.step(self.in_proj(x), state, slots))
        return y

    def step(self, projected: Tensor, state: DeltaState, slots: Tensor) -> Tensor:
        """One token of each of B requests between the input and the output projection: convolution, SiLU, L2 norms,
        gates, state update, read-out and gated RMSNorm.

        Args:
            projected: the input projection's output, `[B, sum(in_proj_sizes)]`, rows `q | k | v | gate | beta | decay`.
            state: the layer's part of the pool, updated in place.
            slots: int64 `[B]`, distinct.

        Returns:
            The output projection's input, `[B, value_dim]`, in `projected`'s dtype.
        """
        qkv, gate, beta_in, decay_in = projected.split(self.spec.in_proj_sizes, dim=-1)
        before = state.gather(slots)
        qkv, conv = self.conv.decode(qkv, before.conv)
        q, k, v = self.split_heads(qkv)
        beta, g = self.gates(beta_in, decay_in)
        q, k = l2_normalise(q), l2_normalise(k)
        o, recurrent = reference_step(
            wide(before.recurrent), q, k, wide(v), g, beta, scale=self.spec.d_k**-0.5
        )
        state.scatter(slots, DeltaState(recurrent, conv))
        return self.gated_norm(o, gate)
