"""Prefill on a GPU: flash-linear-attention's chunk kernels over packed sequences."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import Tensor

from modeling.ops.chunked import chunked_gated_delta_rule


@lru_cache(maxsize=8)
def _offsets(cu_seqlens: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """One tensor for all layers of a batch: fla keeps what it derives from a tensor for as long as it is the same."""
    offsets = torch.tensor(cu_seqlens, dtype=torch.int64)
    return offsets.to(device), offsets


def fla_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float,
    cu_seqlens: Sequence[int],
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`modeling.ops.GatedDeltaRule` by fla's kernels, in v's dtype with a float32 state.

    DeltaNet is the case of decay 1 here: fla's own kernel for it takes as long and knows no groups of value heads.
    In float32 fla's kernels multiply in tf32, so float32 models are computed in plain torch, in full float32.
    """
    if v.dtype in (torch.float32, torch.float64):
        return chunked_gated_delta_rule(
            q, k, v, g, beta, scale=scale, cu_seqlens=cu_seqlens, initial_state=initial_state
        )
    if g is None:
        g = torch.zeros_like(beta, dtype=torch.float32)
    offsets, offsets_on_host = _offsets(tuple(cu_seqlens), v.device)
    o, state = chunk_gated_delta_rule(
        q.to(v.dtype)[None],
        k.to(v.dtype)[None],
        v[None],
        g[None],
        beta.float()[None],
        scale=scale,
        initial_state=None if initial_state is None else initial_state.float(),
        output_final_state=True,
        cu_seqlens=offsets,
        cu_seqlens_cpu=offsets_on_host,
    )
    return o[0].float(), state
