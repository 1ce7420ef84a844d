"""Where packed sequences lie, as a GPU's kernels want to know it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from modeling.device import upload
from modeling.spec import TOKEN_BLOCK


@dataclass(frozen=True)
class Packing:
    """Where packed sequences lie, int64 on the device.

    `offsets` `[sequences + 1]` are `cu_seqlens`; `chunks` `[n, 2]` has a row for each piece of up to `TOKEN_BLOCK`
    tokens of each sequence: the sequence, and which of its pieces it is."""

    offsets: Tensor
    chunks: Tensor


def packing(cu_seqlens: Sequence[int], device: torch.device) -> Packing:
    """The same object for all layers of a batch: fla keeps what it derives from a tensor while that lives."""
    return _packing(tuple(cu_seqlens), device)


@lru_cache(maxsize=8)
def _packing(cu_seqlens: tuple[int, ...], device: torch.device) -> Packing:
    rows = [
        (sequence, chunk)
        for sequence in range(len(cu_seqlens) - 1)
        for chunk in range(-(-(cu_seqlens[sequence + 1] - cu_seqlens[sequence]) // TOKEN_BLOCK))
    ]
    # Kept from call to call, so they must not be inference tensors, which autograd refuses.
    with torch.inference_mode(False):
        return Packing(upload(torch.tensor(cu_seqlens), device), upload(torch.tensor(rows), device))
