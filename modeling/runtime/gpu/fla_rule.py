"""Prompts on a GPU: flash-linear-attention's chunk kernels over packed sequences.

fla's `chunk_gated_delta_rule` is five kernels, and around them what training and other machines need: an autograd
function, a choice among implementations at every step, copies of what may not be contiguous. That takes the host longer
than the launches, so the kernels are launched from here, with what fla would give them.
"""

import math

import torch
from torch import Tensor

from modeling.ops import RuleInputs, chunked_gated_delta_rule
from modeling.runtime.gpu.fla_kernels import Launcher
from modeling.runtime.gpu.packing import Packing, packing
from modeling.runtime.gpu.sizes import ceil_div
from modeling.spec import TOKEN_BLOCK

MAX_D_K = 256
"""The kernel that moves the state on holds four blocks of 64 rows of it."""
SOLVED_BLOCK = 16
"""Tokens that are solved for directly; a chunk's solution is merged of theirs."""
WY_BLOCK = 64
"""Columns of keys and of values that the kernel of the WY representation takes at a time."""

cumulate = Launcher("chunk_local_cumsum_scalar_kernel")
solve = Launcher("chunk_gated_delta_rule_fwd_kkt_solve_kernel")
represent = Launcher("recompute_w_u_fwd_kernel")
move_on = Launcher("chunk_gated_delta_rule_fwd_kernel_h_blockdim64")
read_out = Launcher("chunk_fwd_kernel_o")


def fla_gated_delta_rule(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """`modeling.ops.GatedDeltaRule` by fla's kernels: o in v's dtype, the state in float32. Not differentiable.

    DeltaNet is the case of no decay here: fla's own kernel for it takes as long and knows no groups of value heads.
    In float32 fla's kernels multiply in tf32, so float32 models are computed in plain torch, in full float32.

    Raises:
        ValueError: a d_k above 256, or tensors that the kernels would misread: not contiguous, q or k in another dtype
            than v, g or beta not in float32.
    """
    if inputs.v.dtype in (torch.float32, torch.float64):
        return chunked_gated_delta_rule(inputs)
    _check(inputs)
    packed = packing(inputs.cu_seqlens, inputs.v.device)
    g = None if inputs.g is None else _cumulated(inputs.g, packed)
    return _chunks(inputs, g, packed)


def _check(inputs: RuleInputs) -> None:
    q, k, v, g, beta = inputs.q, inputs.k, inputs.v, inputs.g, inputs.beta
    if k.shape[2] > MAX_D_K:
        raise ValueError(f"fla's kernels take a d_k of at most {MAX_D_K}, got {k.shape[2]}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    gates = (beta,) if g is None else (beta, g)
    if any(t.dtype != torch.float32 for t in gates):
        raise ValueError(f"beta and g must be float32, got {', '.join(str(t.dtype) for t in gates)}")
    state = inputs.initial_state
    if not all(t.is_contiguous() for t in (q, k, v, *gates, *(() if state is None else (state,)))):
        raise ValueError("q, k, v, beta, g and the state must be contiguous")


def _cumulated(g: Tensor, packed: Packing) -> Tensor:
    """Sums of g from the beginning of each token's chunk on, as powers of 2."""
    tokens, heads = g.shape
    sums = torch.empty_like(g)
    cumulate(
        (len(packed.chunks) * heads,),
        s=g,
        o=sums,
        scale=1 / math.log(2),
        cu_seqlens=packed.offsets,
        chunk_indices=packed.chunks,
        T=tokens,
        B=1,
        H=heads,
        BT=TOKEN_BLOCK,
        REVERSE=False,
        USE_GRAPH=False,
    )
    return sums


def _chunks(inputs: RuleInputs, g: Tensor | None, packed: Packing) -> tuple[Tensor, Tensor]:
    """The rule, with g cumulated: each chunk by itself (w and u of the WY representation), then the state from chunk to
    chunk, then o."""
    q, k, v, beta = inputs.q, inputs.k, inputs.v, inputs.beta
    (tokens, k_heads, d_k), (v_heads, d_v) = k.shape, v.shape[1:]
    chunks, sequences = len(packed.chunks), len(inputs.cu_seqlens) - 1
    sizes = {"T": tokens, "H": k_heads, "HV": v_heads, "K": d_k}
    where = {"cu_seqlens": packed.offsets, "chunk_indices": packed.chunks}
    # Zeros, since the kernel writes the lower blocks of each chunk only.
    solved = k.new_zeros(tokens, v_heads, TOKEN_BLOCK)
    solve((chunks, v_heads), k=k, g=g, beta=beta, A=solved, **where, **sizes, BT=TOKEN_BLOCK, BC=SOLVED_BLOCK)
    w, u = k.new_empty(tokens, v_heads, d_k), torch.empty_like(v)
    represent(
        (chunks, v_heads),
        k=k,
        v=v,
        beta=beta,
        w=w,
        u=u,
        A=solved,
        g=g,
        **where,
        **sizes,
        V=d_v,
        BT=TOKEN_BLOCK,
        BK=WY_BLOCK,
        BV=WY_BLOCK,
    )
    states = k.new_empty(chunks, v_heads, d_k, d_v)
    last = k.new_empty(sequences, v_heads, d_k, d_v, dtype=torch.float32)
    new_v = torch.empty_like(v)
    move_on(
        lambda meta: (ceil_div(d_v, meta["BV"]) * sequences * v_heads,),
        k=k,
        v=u,
        w=w,
        v_new=new_v,
        g=g,
        gk=None,
        h=states,
        h0=inputs.initial_state,
        ht=last,
        cu_seqlens=packed.offsets,
        chunk_offsets=packed.chunk_offsets,
        **sizes,
        V=d_v,
        BT=TOKEN_BLOCK,
        STATE_V_FIRST=False,
    )
    o = torch.empty_like(v)
    read_out(
        lambda meta: (ceil_div(d_v, meta["BV"]) * chunks, v_heads),
        q=q,
        k=k,
        v=new_v,
        h=states,
        g=g,
        g_gamma=None,
        o=o,
        **where,
        scale=inputs.scale,
        **sizes,
        V=d_v,
        BT=TOKEN_BLOCK,
        STATE_V_FIRST=False,
    )
    return o, last
