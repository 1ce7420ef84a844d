"""Prefill on a GPU: flash-linear-attention's chunk kernels over packed sequences."""

from collections.abc import Sequence

import torch
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import Tensor

from modeling.ops.chunked import chunked_gated_delta_rule
from modeling.ops.packing import CHUNK, packing


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
    packed = packing(cu_seqlens, v.device)
    o, state = chunk_gated_delta_rule(
        q.to(v.dtype)[None],
        k.to(v.dtype)[None],
        v[None],
        g[None],
        beta.float()[None],
        scale=scale,
        initial_state=None if initial_state is None else initial_state.float(),
        output_final_state=True,
        cu_seqlens=packed.offsets,
        chunk_indices=packed.chunks,
        chunk_size=CHUNK,
    )
    return o[0].float(), state
