"""Prefill on a GPU: flash-linear-attention's chunk kernels over packed sequences."""

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from modeling.ops import RuleInputs, chunked_gated_delta_rule
from modeling.runtime.gpu.packing import packing
from modeling.spec import TOKEN_BLOCK


def _unmarked(function: Any = None, *_: Any, **__: Any) -> Any:
    """In the place of torch's decorators while fla is imported."""
    return (lambda decorated: decorated) if function is None else function


# fla marks what torch.compile is to leave alone, and a few functions that it is to compile. That alone imports all of
# torch's compiler, 1.5 s of each engine's start, and no engine uses it.
with patch.object(torch.compiler, "disable", _unmarked), patch.object(torch, "compile", _unmarked):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule


def fla_gated_delta_rule(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """`modeling.ops.GatedDeltaRule` by fla's kernels, in v's dtype with a float32 state.

    DeltaNet is the case of decay 1 here: fla's own kernel for it takes as long and knows no groups of value heads.
    In float32 fla's kernels multiply in tf32, so float32 models are computed in plain torch, in full float32.
    """
    v, g = inputs.v, inputs.g
    if v.dtype in (torch.float32, torch.float64):
        return chunked_gated_delta_rule(inputs)
    if g is None:
        g = torch.zeros_like(inputs.beta, dtype=torch.float32)
    packed = packing(inputs.cu_seqlens, v.device)
    o, state = chunk_gated_delta_rule(
        inputs.q.to(v.dtype)[None],
        inputs.k.to(v.dtype)[None],
        v[None],
        g[None],
        inputs.beta.float()[None],
        scale=inputs.scale,
        initial_state=None if inputs.initial_state is None else inputs.initial_state.float(),
        output_final_state=True,
        cu_seqlens=packed.offsets,
        chunk_indices=packed.chunks,
        chunk_size=TOKEN_BLOCK,
    )
    return o[0].float(), state
