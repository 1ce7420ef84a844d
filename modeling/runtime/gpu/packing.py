"""Where packed sequences lie, as a GPU's kernels want to know it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from modeling.device import upload
from modeling.runtime.gpu.sizes import ceil_div
from modeling.spec import TOKEN_BLOCK


@dataclass(frozen=True)
class Packing:
    """Where packed sequences lie, int64 on the device.

    `offsets` `[sequences + 1]` are `cu_seqlens`; `chunks` `[n, 2]` has a row for each piece of up to `TOKEN_BLOCK`
    tokens of each sequence: the sequence, and which of its pieces it is. `chunk_offsets` `[sequences + 1]` say where
    the rows of each sequence begin and end."""

    offsets: Tensor
    chunks: Tensor
    chunk_offsets: Tensor


def packing(cu_seqlens: Sequence[int], device: torch.device) -> Packing:
    """The same object for all layers of a batch."""
    return _packing(tuple(cu_seqlens), device)


@lru_cache(maxsize=8)
def _packing(cu_seqlens: tuple[int, ...], device: torch.device) -> Packing:
    rows: list[tuple[int, int]] = []
    starts = [0]
    for sequence, (begin, end) in enumerate(itertools.pairwise(cu_seqlens)):
        rows += [(sequence, chunk) for chunk in range(ceil_div(end - begin, TOKEN_BLOCK))]
        starts.append(len(rows))
    # Each in memory of its own: where a slice of a longer tensor begins would decide which kernel Triton compiles.
    offsets, chunks, chunk_offsets = (
        upload(torch.tensor(values), device) for values in (cu_seqlens, rows, starts)
    )
    return Packing(offsets, chunks, chunk_offsets)
