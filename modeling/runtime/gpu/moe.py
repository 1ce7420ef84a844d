"""The mixture of experts by Triton kernels, without waiting for the device: which experts are hit stays there.

It is bound by memory until every expert has about a hundred tokens, so what counts is that each expert's matrices are
read once, by many programs at a time. There are two ways:

- *Few tokens* hardly ever share an expert. Each pair of a token and an expert is a product of a vector, and one program
  adds up all pairs of a token for some columns. Each program takes the norm for itself: three launches in all.
- *More tokens* are sorted by expert. `route` counts whom each expert gets and lists them in a table that has a place
  for every token at each expert, so that nothing has to be moved afterwards. A program takes a block of one expert's
  list; whose block it is it finds out from the counts, and does nothing if there are fewer. The pairs' products lie in
  memory until `combine` adds up each token's, always in the same order.

The expert that all tokens take is computed by the same launches, as one more expert.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modeling.layers import MoE, RMSNorm
from modeling.runtime.gpu.kernels.moe import combine, experts_in, experts_out, route
from modeling.runtime.gpu.kernels.moe_few import few_in, few_out, few_scores
from modeling.runtime.gpu.norms import normed
from modeling.runtime.gpu.products import product
from modeling.runtime.gpu.sizes import ceil_div, power_of_2


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a kernel of products: pairs, columns of the output and of the input; and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class RowTiles:
    """Columns of the output and of the input, and warps, of a kernel of products of one pair each."""

    block_n: int
    block_k: int
    num_warps: int


FEW_ROWS = 4
"""Tokens up to which each pair is computed by itself. It and the tiles are measured on an H200, with 256 experts of
which a token takes 8, a hidden size of 2048 and an expert size of 512."""
SCORES_BLOCK, SCORES_WARPS = 4, 4
"""Experts whose scores a program of `few_scores` computes."""
FEW_IN, FEW_IN_STAGES = RowTiles(16, 256, 4), 3
FEW_OUT = RowTiles(8, 512, 4)

ROUTE_WARPS = 4

SORTED: tuple[tuple[float, Tiles, Tiles], ...] = (
    (12, Tiles(16, 32, 128, 4, 4), Tiles(16, 64, 128, 4, 4)),
    (24, Tiles(32, 64, 64, 4, 4), Tiles(32, 128, 64, 4, 4)),
    (48, Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 4)),
    (float("inf"), Tiles(128, 128, 64, 8, 4), Tiles(128, 256, 64, 8, 3)),
)
"""The tiles of the two products by how many tokens an expert has on average, up to the first number."""
FLOAT32 = Tiles(16, 32, 32, 4, 2)
"""The tiles in float32, which is computed without tensor cores: for comparisons, not for speed."""

COMBINE_BLOCK = 1024
"""Columns that a program of `combine` takes."""


def add_moe(moe: MoE, x: Tensor, norm: RMSNorm | None, residual: Tensor | None) -> Tensor:
    """The experts' output of x, added to the residual, as `modeling.runtime.gpu.runtime` says.

    The router's softmax, the weights and all sums are in float32. A token's output does not depend on the other tokens
    in the batch, only on how many there are.

    Args:
        x: `[rows, hidden]`, contiguous, float32, bfloat16 or float16.

    Raises:
        ValueError: float64 tensors, whose precision the kernels would silently lose.
    """
    if x.dtype == torch.float64:
        raise ValueError(
            "the Triton kernels of experts compute in float32; for float64 use the torch runtime"
        )
    s = moe.spec
    z = x.new_empty(len(x) * (s.top_k + 1), max(s.expert_size, s.shared_size))
    sizes = {
        "hidden": x.shape[1],
        "size": s.expert_size,
        "shared_size": s.shared_size,
        "z_size": z.shape[1],
        "top_k": s.top_k,
    }
    add = _add_few if len(x) <= FEW_ROWS else _add_sorted
    return add(moe, x, norm, residual, z, sizes)


def _add_few(
    moe: MoE,
    x: Tensor,
    norm: RMSNorm | None,
    residual: Tensor | None,
    z: Tensor,
    sizes: dict[str, int],
) -> Tensor:
    """Each pair by itself."""
    rows, hidden = x.shape
    experts = moe.spec.num_experts
    norm_weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    logits = x.new_empty(rows, experts)
    few_scores[(ceil_div(experts, SCORES_BLOCK), rows)](
        x,
        norm_weight,
        moe.router.weight,
        logits,
        eps,
        hidden=hidden,
        experts=experts,
        block_n=SCORES_BLOCK,
        block_k=power_of_2(hidden),
        num_warps=SCORES_WARPS,
    )
    chosen = x.new_empty(rows, moe.spec.top_k, dtype=torch.int32)
    weights = x.new_empty(rows, moe.spec.top_k + 1, dtype=torch.float32)
    few_in[(len(z), ceil_div(z.shape[1], FEW_IN.block_n))](
        logits,
        x,
        norm_weight,
        moe.shared_gate.weight,
        z,
        moe.in_proj,
        moe.shared.in_proj.weight,
        chosen,
        weights,
        eps,
        **sizes,
        experts=experts,
        block_e=power_of_2(experts),
        block_j=power_of_2(moe.spec.top_k),
        block_n=FEW_IN.block_n,
        block_k=FEW_IN.block_k,
        stages=FEW_IN_STAGES,
        num_warps=FEW_IN.num_warps,
    )
    out = torch.empty_like(x) if residual is None else residual
    few_out[(ceil_div(hidden, FEW_OUT.block_n), rows)](
        z,
        moe.out_proj,
        moe.shared.out_proj.weight,
        chosen,
        weights,
        residual,
        out,
        **sizes,
        block_n=FEW_OUT.block_n,
        block_k=FEW_OUT.block_k,
        num_warps=FEW_OUT.num_warps,
    )
    return out


def _add_sorted(
    moe: MoE,
    x: Tensor,
    norm: RMSNorm | None,
    residual: Tensor | None,
    z: Tensor,
    sizes: dict[str, int],
) -> Tensor:
    """Each expert with the list of its pairs."""
    rows, hidden = x.shape
    experts, pairs = moe.spec.num_experts, rows * moe.spec.top_k
    inputs = x if norm is None else normed(norm, x)
    weights = x.new_empty(rows, moe.spec.top_k + 1, dtype=torch.float32)
    counts = x.new_zeros(experts, dtype=torch.int32)
    table = x.new_empty(experts, rows, dtype=torch.int32)
    route[(rows,)](
        product(inputs, moe.router.weight),
        inputs,
        moe.shared_gate.weight,
        weights,
        counts,
        table,
        rows,
        hidden=hidden,
        experts=experts,
        top_k=moe.spec.top_k,
        block_h=power_of_2(hidden),
        block_e=power_of_2(experts),
        block_j=power_of_2(moe.spec.top_k),
        num_warps=ROUTE_WARPS,
    )
    y = z.new_empty(len(z), hidden)
    tiles_in, tiles_out = tiles(pairs / experts, z.dtype)
    for kernel, source, target, matrices, shared, t in (
        (experts_in, inputs, z, moe.in_proj, moe.shared.in_proj.weight, tiles_in),
        (experts_out, z, y, moe.out_proj, moe.shared.out_proj.weight, tiles_out),
    ):
        # No more blocks than this: each expert that is hit has one that is not full at most.
        blocks = ceil_div(rows, t.block_m) + min(experts, pairs) + pairs // t.block_m
        kernel[(blocks, ceil_div(target.shape[1], t.block_n))](
            source,
            target,
            matrices,
            shared,
            counts,
            table,
            rows,
            **sizes,
            experts=experts,
            block_e=power_of_2(experts),
            block_m=t.block_m,
            block_n=t.block_n,
            block_k=t.block_k,
            num_warps=t.num_warps,
            num_stages=t.num_stages,
        )
    out = torch.empty_like(x) if residual is None else residual
    combine[(rows, ceil_div(hidden, COMBINE_BLOCK))](
        y, weights, residual, out, hidden=hidden, top_k=moe.spec.top_k, block=COMBINE_BLOCK
    )
    return out


def tiles(tokens: float, dtype: torch.dtype) -> tuple[Tiles, Tiles]:
    """The tiles of the two products where an expert has so many tokens on average."""
    if dtype == torch.float32:
        return FLOAT32, FLOAT32
    return next((first, second) for most, first, second in SORTED if tokens <= most)
