"""Memory of the host in large pages, for what every step reads: weights and states.

With small pages each 4 KiB need a walk through the page tables of their own, and hardware prefetchers stop at their
ends: matrices were read at 16 GB/s by one core where large pages gave 21.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor, nn

PAGE_BYTES = 2 << 20
_ALIGNMENT = 64
"""Where each parameter may begin: at a multiple of a cache line, in bytes."""


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """As torch.zeros, in large pages where it is on a CPU whose system has them and fills one at least."""
    size = math.prod(shape)
    if (
        torch.device(device).type != "cpu"
        or size * dtype.itemsize < PAGE_BYTES
        or not hasattr(mmap, "MADV_HUGEPAGE")
    ):
        return torch.zeros(*shape, dtype=dtype, device=device)
    block = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=dtype, count=size).view(*shape)


def gather_parameters(model: nn.Module) -> None:
    """Move a model's parameters, all on a CPU, next to each other into large pages; most would not fill one alone. Each
    old copy is given up as soon as it is copied, and the new memory is taken as it is filled."""
    parameters = list(model.parameters())
    sizes = [-(-p.nbytes // _ALIGNMENT) * _ALIGNMENT for p in parameters]
    block = zeros([sum(sizes)], torch.uint8)
    for parameter, part in zip(parameters, block.split(sizes), strict=True):
        moved = part[: parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        parameter.data = moved.copy_(parameter.detach())
