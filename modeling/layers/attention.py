"""Softmax attention with grouped heads, partial rotary embeddings, norms of queries and keys, and an output gate."""

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.layers.mixer import Mixer
from modeling.layers.norms import RMSNorm
from modeling.ops import wide
from modeling.spec import AttentionSpec, RopeSpec, StateTypes
from modeling.state import KVState, LayerState, SequenceState


class AttentionMixer(Mixer):
    """Softmax attention token mixer with one fused input projection, rows `q | k | v | gate`."""

    def __init__(self, spec: AttentionSpec, hidden_size: int, layer: int) -> None:
        super().__init__()
        self.spec = spec
        self.in_proj = nn.Linear(hidden_size, sum(spec.in_proj_sizes), bias=False)
        if spec.qk_norm != "none":
            sizes = (spec.q_dim, spec.kv_dim) if spec.qk_norm == "whole" else (spec.head_dim,) * 2
            self.q_norm, self.k_norm = (RMSNorm(size, spec.norm_eps) for size in sizes)
        self.o_proj = nn.Linear(spec.q_dim, hidden_size, bias=False)

    def forward(
        self, x: Tensor, cu_seqlens: Sequence[int], state: SequenceState | None = None
    ) -> tuple[Tensor, KVState]:
        assert state is None or isinstance(state, KVState)
        s = self.spec
        q, k, v, gate = self.in_proj(x).split(s.in_proj_sizes, dim=-1)
        lengths = [end - start for start, end in itertools.pairwise(cu_seqlens)]
        before = (
            KVState.zeros(s, len(lengths), StateTypes(inputs=x.dtype), x.device) if state is None else state
        )
        starts = [len(keys) for keys in before.keys]
        q, k = self._normed(q, k)
        v = v.unflatten(-1, (-1, s.head_dim))
        if s.rope is not None:
            positions = [
                torch.arange(at, at + n, device=x.device) for at, n in zip(starts, lengths, strict=True)
            ]
            q, k = rotate(s.rope, torch.cat(positions), q, k)
        after = before.extended(k.split(lengths), v.split(lengths))
        pieces = zip(q.split(lengths), after.keys, after.values, strict=True)
        o = torch.cat([attend(*piece) for piece in pieces]).flatten(1)
        if s.gated:
            o = o * gate.sigmoid()
        return self.o_proj(o), after

    def decode(self, x: Tensor, state: LayerState, slots: Tensor) -> Tensor:
        return self.prefill(x, range(len(x) + 1), state, slots)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q `[tokens, num_heads, head_dim]` and k `[tokens, num_kv_heads, head_dim]`, normalised as the spec says."""
        head = (-1, self.spec.head_dim)
        if self.spec.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.unflatten(-1, head), k.unflatten(-1, head)
        if self.spec.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k


def attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal softmax attention of one sequence, whose last tokens are those of q.

    Args:
        q: `[tokens, num_heads, head_dim]`.
        keys, values: `[all tokens, num_kv_heads, head_dim]`.

    Returns:
        Like q.
    """
    groups = q.shape[1] // keys.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1).transpose(0, 1) for t in (keys, values))
    past = len(keys) - len(q)
    # Without a past the mask is the one that torch knows by itself, and fused kernels then need no tensor for it.
    mask = None if past == 0 else q.new_ones(len(q), len(keys), dtype=torch.bool).tril(past)
    # Fused kernels, which hold no matrix of scores, take batches only.
    q, k, v = q.transpose(0, 1)[None], k[None], v[None]
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past == 0)
    return o[0].transpose(0, 1)


def rotate(rope: RopeSpec, positions: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
    """Rotate the first channels of each of `heads`, `[tokens, heads, head_dim]`, by the positions `[tokens]` of their
    tokens. Angles are computed in float32 or wider."""
    half = rope.dims // 2
    dtype = wide(heads[0]).dtype
    exponents = torch.arange(half, device=positions.device, dtype=dtype) / half
    angles = positions.to(dtype)[:, None, None] * rope.theta**-exponents
    cos, sin = angles.cos().to(heads[0].dtype), angles.sin().to(heads[0].dtype)

    def rotated(x: Tensor) -> Tensor:
        a, b, rest = x.split([half, half, x.shape[-1] - rope.dims], dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)

    return tuple(map(rotated, heads))
