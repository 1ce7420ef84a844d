"""Tensors of states on their way between the host and where they are kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def put(host: Tensor, target: Tensor) -> None:
    """Copy a tensor on the host into a part of a state, of the same shape and dtype; on a GPU the copy is only queued.
    Raises MemoryError."""
    if target.is_cuda:
        # A pinned tensor is not read here, since the copy that fills it may still be queued. torch keeps the pinned
        # block until it is copied: its allocator reuses a block only when the streams that have copied from it are past
        # that.
        target.copy_(host if host.is_pinned() else pinned(host), non_blocking=True)
    else:
        _copy(host, target)


def pinned(host: Tensor) -> Tensor:
    """A copy in memory that a GPU reads by itself. Raises MemoryError."""
    copy = empty(host.shape, host.dtype, pin_memory=True)
    _copy(host, copy)
    return copy


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host; from a GPU it is only queued, and whole once the device has done all that it had been given.
    Raises MemoryError."""
    return empty(tensor.shape, tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor, non_blocking=True)


def empty(shape: Sequence[int], dtype: torch.dtype, *, pin_memory: bool) -> Tensor:
    """Memory on the host, pinned where a GPU is to copy from it or to it. Raises MemoryError."""
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=pin_memory)
    except RuntimeError as e:  # torch has no class of its own for this
        raise MemoryError(f"no memory on the host: {e}") from e


@contextmanager
def device_memory_errors() -> Iterator[None]:
    """Within, a device that has no memory left is a MemoryError, as a host is."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise MemoryError(
            "no memory on the device"
        ) from e  # what torch says of other processes is not for clients


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _copy(source: Tensor, target: Tensor) -> None:
    # By numpy: torch would start threads for it that compete with those of the steps. It knows no bfloat16.
    word = _WORDS[target.element_size()]
    np.copyto(target.view(word).numpy(), source.view(word).numpy())
