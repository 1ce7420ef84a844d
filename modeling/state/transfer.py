"""Tensors of states on their way between the host and where they are kept."""

import numpy as np
import torch
from torch import Tensor


def put(host: Tensor, target: Tensor) -> None:
    """Copy a tensor on the host into a part of a state, of the same shape and dtype; on a GPU the copy is only queued.
    Raises MemoryError."""
    if target.is_cuda:
        # torch keeps the pinned block until it is copied: its allocator reuses a block only when the streams that have
        # copied from it are past that.
        pinned = pinned_like(host)
        _copy(host, pinned)
        target.copy_(pinned, non_blocking=True)
    else:
        _copy(host, target)


def pinned_like(tensor: Tensor) -> Tensor:
    """Pinned memory on the host for as much as the tensor holds. Raises MemoryError."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError as e:  # torch has no class of its own for this
        raise MemoryError(f"no pinned memory: {e}") from e


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; from a GPU it is only queued, and whole once the device has done all that it had been given.
    Raises MemoryError."""
    if tensor.is_cuda:
        return pinned_like(tensor).copy_(tensor, non_blocking=True)
    try:
        return tensor.clone()
    except RuntimeError as e:  # torch has no class of its own for this
        raise MemoryError(f"no memory on the host: {e}") from e


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _copy(source: Tensor, target: Tensor) -> None:
    # By numpy: torch would start threads for it that compete with those of the steps. It knows no bfloat16.
    word = _WORDS[target.element_size()]
    np.copyto(target.view(word).numpy(), source.view(word).numpy())
