"""Products with weights, and what is done around them: the norm before, SwiGLU or the residual sum behind.

That of a single row takes the time of reading its weight once, and a Triton kernel of ours does it with all around it
in one launch. For more rows the libraries are as fast, launches included: measured, docs/gpu.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.layers import RMSNorm
from modeling.runtime.gpu.kernels.mlp import swiglu
from modeling.runtime.gpu.kernels.products import one_row
from modeling.runtime.gpu.norms import normed
from modeling.runtime.gpu.sizes import ceil_div

SWIGLU_BLOCK = 1024
"""Columns that a program of the kernel `swiglu` takes at a time."""
LEAST_WEIGHT = 1 << 20
"""Numbers of a weight below which a product takes no longer than its launches, whoever computes it."""
NARROW, WIDE = 4096, 10560
"""Columns of a product up to which those of a program are read in longer pieces, and from which on programs of 16 would
be more than five on each of an H200's multiprocessors."""


@dataclass(frozen=True)
class Tile:
    """How the kernel for one row is launched: a program computes `block_n` columns, from `block_k` of the width at a
    time, with `stages - 1` such pieces of the weight on their way from memory."""

    block_n: int
    block_k: int
    stages: int


def tile_of(x: Tensor, weight: Tensor, *, gated: bool) -> Tile | None:
    """How x times the transposed weight is launched, with SwiGLU if it is `gated`; None if it is the libraries'."""
    if x.shape[0] != 1 or weight.dtype != torch.bfloat16 or weight.numel() < LEAST_WEIGHT:
        return None
    if gated:
        return Tile(8, 256, 3)
    if weight.shape[0] <= NARROW:
        return Tile(8, 512, 4)
    return Tile(16, 256, 3) if weight.shape[0] <= WIDE else Tile(8, 256, 5)


def product(x: Tensor, weight: Tensor, norm: RMSNorm | None = None, residual: Tensor | None = None) -> Tensor:
    """norm(x) times the transposed weight.

    Args:
        x: `[rows, in]`.
        weight: `[out, in]`.
        norm: what x is normalised by before; None for nothing.
        residual: what the product is added to, `[rows, out]`, in its own memory, which must not be x's.

    Returns:
        `[rows, out]` in x's dtype.
    """
    tile = tile_of(x, weight, gated=False)
    if tile is not None:
        out = x.new_empty(1, weight.shape[0]) if residual is None else residual
        return launch(tile, x, weight, norm, out, adds=residual is not None)
    if norm is not None:
        x = normed(norm, x)
    return torch.mm(x, weight.t()) if residual is None else residual.addmm_(x, weight.t())


def gated_product(x: Tensor, weight: Tensor, norm: RMSNorm | None = None) -> Tensor:
    """SwiGLU of norm(x) times the transposed weight.

    Args:
        x: `[rows, in]`.
        weight: `[2 * out, in]`, rows `gate | up`.
        norm: what x is normalised by before; None for nothing.

    Returns:
        silu(gate) * up, `[rows, out]` in x's dtype.
    """
    rows, size = x.shape[0], weight.shape[0] // 2
    out = x.new_empty(rows, size)
    tile = tile_of(x, weight, gated=True)
    if tile is not None:
        return launch(tile, x, weight, norm, out, gated=True)
    z = torch.mm(x if norm is None else normed(norm, x), weight.t())
    swiglu[(rows, ceil_div(size, SWIGLU_BLOCK))](z, out, size, block=SWIGLU_BLOCK)
    return out


def launch(
    tile: Tile,
    x: Tensor,
    weight: Tensor,
    norm: RMSNorm | None,
    out: Tensor,
    *,
    gated: bool = False,
    adds: bool = False,
) -> Tensor:
    """One row's product by the Triton kernel, as `product` and `gated_product` say. Returns `out`, to which it is added
    if it `adds`."""
    width, size = x.shape[1], out.shape[1]
    one_row[(ceil_div(size, tile.block_n),)](
        x,
        weight,
        None if norm is None else norm.weight,
        out,
        size,
        width,
        0.0 if norm is None else norm.eps,
        gated=gated,
        adds=adds,
        is_even=width % tile.block_k == 0,
        block_n=tile.block_n,
        block_k=tile.block_k,
        stages=tile.stages,
    )
    return out
