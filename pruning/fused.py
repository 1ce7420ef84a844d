"""The gated delta rule for training on a CUDA card, by flash-linear-attention's kernels and their backward.

`chunked_gated_delta_rule` takes a few dozen launches for each chunk of a sequence; these kernels take fifteen for all
sequences together, forward and backward.
"""

import atexit
import json
import logging
import os
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowkey import how_to_install
from modeling.ops import GatedDeltaRule, RuleInputs, chunked_gated_delta_rule

logger = logging.getLogger(__name__)

MAX_D_K = 256
"""The widest keys that fla's kernels take."""
HOPPER = (9, 0)
"""The compute capability of the cards that `CONFIGS` is for."""
CONFIGS = {
    "chunk_local_cumsum_scalar_kernel": ({}, 1, 3),
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": ({"BK": 64}, 1, 3),
    "recompute_w_u_fwd_kernel": ({}, 4, 3),
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": ({"BV": 32}, 4, 2),
    "chunk_fwd_kernel_o": ({"BK": 64, "BV": 64}, 4, 3),
    "chunk_bwd_kernel_dv_local": ({}, 4, 3),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": ({"BV": 32}, 4, 2),
    "prepare_wy_repr_bwd_kernel": ({}, 4, 2),
    "l2norm_fwd_kernel": ({"BT": 32}, 4, 3),
    "l2norm_bwd_kernel": ({"BT": 32}, 4, 3),
    "causal_conv1d_fwd_kernel": ({"BD": 64}, 4, 3),
    "causal_conv1d_bwd_kernel": ({"BD": 64}, 8, 3),
}
"""Kernels of fla, and what each is launched with on a Hopper card: its own constants, its warps, its stages. fla would
tune each of them at its first launch, which takes minutes."""


@cache
def training_rule(device: torch.device) -> GatedDeltaRule | None:
    """The rule to train with on a device: fla's on a GPU; None for plain torch, on a CPU and, said in the log, where
    fla can't be imported."""
    if device.type != "cuda":
        return None
    if torch.cuda.get_device_capability(device) == HOPPER:
        fix_configurations()
    try:
        chunk_rule()
    except ImportError as e:
        logger.warning(
            "training by plain torch operations, several times slower than by fla's kernels: %s: %s",
            e,
            how_to_install("gpu"),
        )
        return None
    return fla_gated_delta_rule


@cache
def fix_configurations() -> None:
    """Tell fla `CONFIGS`, in files of its own format. Call this first: fla asks where they are when it is imported."""
    temporary = tempfile.TemporaryDirectory(prefix="fla-configs-")
    atexit.register(temporary.cleanup)  # fla reads a file when it first launches that kernel
    folder = Path(temporary.name)
    for name, (constants, warps, stages) in CONFIGS.items():
        config = {"kwargs": constants, "num_warps": warps, "num_stages": stages, "num_ctas": 1}
        (folder / f"{name}.json").write_text(json.dumps({"kernel_name": name, "default_config": config}))
    os.environ["FLA_CONFIG_DIR"], os.environ["FLA_CACHE_MODE"] = str(folder), "default"


def fla_gated_delta_rule(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """`modeling.ops.GatedDeltaRule` by fla's kernels with their backward, in v's dtype; by plain torch where keys are
    wider than `MAX_D_K`."""
    if inputs.k.shape[2] > MAX_D_K:
        return chunked_gated_delta_rule(inputs)
    v = inputs.v[None]
    q, k = (t.to(v.dtype)[None] for t in (inputs.q, inputs.k))
    beta = inputs.beta[None]
    g = torch.zeros_like(beta) if inputs.g is None else inputs.g[None]
    o, state = chunk_rule()(
        q,
        k,
        v,
        g,
        beta,
        scale=inputs.scale,
        initial_state=inputs.initial_state,
        output_final_state=True,
        cu_seqlens=torch.tensor(inputs.cu_seqlens, device=v.device),
    )
    return o[0], state


@cache
def chunk_rule() -> Any:
    """fla's `chunk_gated_delta_rule`, with one function of its backward replaced by `chunk_gradients`.

    The kernel that fla has for it gives wrong gradients on Hopper cards where it is compiled by Triton 3.4 to 3.7.0
    (fla's issue 640), and fla then refuses to run.
    """
    module: Any = import_module("fla.ops.gated_delta_rule.chunk")
    module.chunk_bwd_dqkwg = chunk_gradients
    return module.chunk_gated_delta_rule


def chunk_gradients(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    g: Tensor,
    h: Tensor,
    dv: Tensor,
    do: Tensor,
    dh: Tensor,
    scale: float,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    chunk_size: int,
    state_v_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients that chunks pass on to q, k, w and g, once those of the states are known: batched matrix products.

    With S the state before a chunk and a the decay since its beginning, a chunk reads
    `o_i = scale * (a_i S^T q_i + sum over j <= i of (a_i / a_j) (q_i . k_j) v_j)` and leaves behind
    `a_last S + sum over j of (a_last / a_j) k_j v_j^T`; the v here are the corrected values u - S^T w, so w's gradient
    comes of theirs.

    Args:
        q, k: `[batch, tokens, num_k_heads, d_k]`.
        v, do, dv: the corrected values, and the gradients of o and of them, `[batch, tokens, num_v_heads, d_v]`.
        w: only its shape is needed, `[batch, tokens, num_v_heads, d_k]`.
        g: log2 of a, float32 `[batch, tokens, num_v_heads]`.
        h, dh: the states before each chunk, and the gradients of those after, `[batch, chunks, num_v_heads, d_k, d_v]`.
        cu_seqlens: offsets of packed sequences, or None for sequences of one length.
        chunk_indices: for each chunk the index of its sequence, and its own index in that, `[chunks, 2]`; with
            `cu_seqlens` only.

    Returns:
        The gradients of q, k, w and g, the last before it was summed up along the chunk.
    """
    assert not state_v_first
    batch, length, k_heads, _ = k.shape
    heads, tokens = v.shape[2], batch * length
    groups = heads // k_heads
    where = _chunk_rows(batch, length, cu_seqlens, chunk_indices, chunk_size, g.device)

    def chunks(x: Tensor) -> Tensor:
        """`[batch, tokens, heads, d]` -> `[chunks * heads, chunk, d]`, zero behind the end of a sequence."""
        x = x.flatten(0, 1)
        if where is None:
            x = x.view(-1, chunk_size, *x.shape[1:])
        else:
            x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])[where]
        return x.transpose(1, 2).flatten(0, 1)

    def packed(x: Tensor) -> Tensor:
        """The inverse of `chunks`."""
        x = x.unflatten(0, (-1, heads)).transpose(1, 2).flatten(0, 1)
        if where is not None:
            x = x.new_empty(tokens + 1, *x.shape[1:]).index_copy(0, where.flatten(), x)[:-1]
        return x.view(batch, length, *x.shape[1:])

    def product(a: Tensor, b: Tensor) -> Tensor:
        """The matrix product in float32."""
        return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())

    with torch.autocast(v.device.type, enabled=False):
        if groups > 1:
            q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
        qc, kc, vc, doc, dvc = (chunks(x) for x in (q, k, v, do, dv))
        states, later = (x.flatten(0, 2).to(v.dtype) for x in (h, dh))
        decay = chunks(g[..., None])[..., 0]
        if where is not None:  # behind the end of a sequence a is what it was at the end
            last = chunks(torch.ones_like(g)[..., None])[..., 0].sum(-1).long() - 1
        else:
            last = torch.full((len(decay),), chunk_size - 1, device=g.device)
        inner = weigh(product(doc, vc.mT), decay, scale).to(v.dtype)
        products = (
            product(doc, states.mT),
            product(inner, kc),
            product(vc, later.mT),
            product(inner.mT, qc),
        )
        dq, dk, dg = combine(*products, qc, kc, states, later, decay, last, scale)
        dw = packed(-product(dvc, states.mT)).to(w.dtype)
        dq, dk = (packed(x).unflatten(2, (k_heads, groups)).sum(3).to(v.dtype) for x in (dq, dk))
        return dq, dk, dw, packed(dg[..., None])[..., 0].contiguous()


def weigh(products: Tensor, decay: Tensor, scale: float) -> Tensor:
    """Products of a chunk's tokens `[n, chunk, chunk]`, each with what decays in between; later tokens' are zero."""
    # Behind the end of a sequence nothing has decayed, and differences could overflow there.
    ratio = (decay[:, :, None] - decay[:, None, :]).clamp(max=0).exp2().tril()
    return products * ratio * scale


def combine(
    read: Tensor,
    read_inside: Tensor,
    kept: Tensor,
    kept_inside: Tensor,
    q: Tensor,
    k: Tensor,
    states: Tensor,
    later: Tensor,
    decay: Tensor,
    last: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q and k `[n, chunk, d_k]`, by way of the states and inside the chunk, and that of g
    `[n, chunk]`."""
    at_end = decay.gather(1, last[:, None])
    dq = read * decay.exp2()[..., None] * scale + read_inside
    kept = kept * (at_end - decay).exp2()[..., None]
    dk = kept + kept_inside
    of_states = (states.float() * later.float()).sum((1, 2)) * at_end[:, 0].exp2()
    of_end = of_states + (kept * k).sum((1, 2))
    dg = (dq * q).sum(-1) - (dk * k).sum(-1)
    return dq, dk, dg.scatter_add(1, last[:, None], of_end[:, None])


def _chunk_rows(
    batch: int,
    length: int,
    cu_seqlens: Tensor | None,
    chunk_indices: Tensor | None,
    chunk_size: int,
    device: torch.device,
) -> Tensor | None:
    """For each place of each chunk its token, or the number of tokens behind the end of a sequence: int64
    `[chunks, chunk_size]`. None where all sequences are of one length that is a multiple of the chunk's."""
    if cu_seqlens is None:
        if length % chunk_size == 0:
            return None
        cu_seqlens = torch.arange(batch + 1, device=device) * length
        which = torch.arange(-(-length // chunk_size), device=device).repeat(batch)
        sequence = torch.arange(batch, device=device).repeat_interleave(-(-length // chunk_size))
    else:
        assert chunk_indices is not None  # fla makes them of the offsets
        sequence, which = chunk_indices.long().unbind(-1)
    rows = (cu_seqlens[sequence] + which * chunk_size)[:, None] + torch.arange(chunk_size, device=device)
    return torch.where(rows < cu_seqlens[sequence + 1][:, None], rows, batch * length)
