"""What other memory plans than an engine's own would be made of: the bytes of its requests in every dtype, here and on
a GPU, beside those of the model that its own was reduced from."""

import torch

from modeling.checkpoint import Checkpoint
from modeling.runtime import Runtime, UnavailableError
from modeling.spec import STATE_DTYPES, ModelSpec, StateDType, StateTypes
from modeling.state import page_bytes
from server.engine.memory import RESERVED, MemoryPlan, dense_d_k, weights_of
from server.wire.messages import Planning, RequestBytes, Sizes


def planning(checkpoint: Checkpoint, runtime: Runtime, plan: MemoryPlan, dtype: torch.dtype) -> Planning:
    """What there is to say of other plans.

    Args:
        runtime: which states it can compute decides about the dtypes.
        plan: the engine's own.
        dtype: the weights'.
    """
    spec, widths = checkpoint.spec, dense_d_k(checkpoint)
    dense = None if widths is None or widths == spec.d_k else spec.with_d_k(widths)

    def sizes(weights: torch.dtype, other_bytes: int) -> Sizes:
        names = [name for name in STATE_DTYPES if _can_serve(runtime, StateTypes.named(name, weights))]
        return Sizes(
            other_bytes=other_bytes,
            state_dtypes=_by_dtype(spec, names, weights),
            dense=None if dense is None else _by_dtype(dense, names, weights),
        )

    here = sizes(dtype, plan.needs.total)
    on_gpu = plan.budget is not None
    return Planning(
        context_tokens=plan.room.context_tokens,
        context_length=spec.context_length,
        budget=plan.budget,
        dense_d_k=None if dense is None else list(dense.d_k),
        here=here,
        gpu=here if on_gpu else sizes(torch.bfloat16, weights_of(checkpoint, torch.bfloat16) + RESERVED),
    )


def _can_serve(runtime: Runtime, types: StateTypes) -> bool:
    try:
        runtime.check_states(types)
    except UnavailableError:
        return False
    return True


def _by_dtype(
    spec: ModelSpec, names: list[StateDType], weights: torch.dtype
) -> dict[StateDType, RequestBytes]:
    found = {}
    for name in names:
        types = StateTypes.named(name, weights)
        found[name] = RequestBytes(
            state_bytes=spec.state_bytes(0, types), kv_bytes_per_page=page_bytes(spec, types)
        )
    return found
