"""Plugin of vLLM for key widths that vLLM itself cannot prefill, in one file that imports nothing else of this project.

vLLM finds `register` by the entry point `lowkey` in the group `vllm.general_plugins` and calls it in each of its
processes. Two things then change, and only for Gated DeltaNet layers whose widths need it:

1. vLLM prepares prefill with one Triton kernel that gives the variable `mask_2d` the shape `[16, next_power_of_2(d_k)]`
   in one branch and `[16, next_power_of_2(d_v)]` in the other. Triton compiles that only where the two are equal, so
   that vLLM does not start with d_k <= 64 and d_v 128. For such widths `prepare_prefill` below takes its place.
2. On Hopper vLLM chooses FlashInfer's prefill for every d_k, and FlashInfer takes 128 only. For another d_k vLLM's own
   Triton prefill is chosen instead, unless the user asked for a prefill.

OLMo-Hybrid (d_k 96, d_v 192) needs neither: vLLM computes its gates in a kernel without widths, normalises q and k
inside the rule, and always uses Triton.

This was read against the versions in `KNOWN`, all of whose kernels are the same. With any other version the plugin says
so and changes nothing.
"""

import importlib.machinery
import inspect
import logging
import re
import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

KNOWN = ("0.26.0", "0.27.0", "0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0")
"""Versions of vLLM in which the two functions that are replaced, and those that call them, were read."""
FLASHINFER_D_K = 128
"""The only key width of FlashInfer's prefill."""
BLOCK_TOKENS = 16
NORM_EPS = 1e-6
"""vLLM's, under the square root."""

log = logging.getLogger("vllm.plugins.lowkey")  # below vLLM's logger, whose handler prints it


@triton.jit
def move_head(
    source, target, rows, mask, source_stride, target_stride, width, block: tl.constexpr, normalise, eps
):
    """Copies `width` channels of a block of tokens, scaled to length 1 if `normalise`."""
    columns = tl.arange(0, block)
    inside = mask[:, None] & (columns < width)[None, :]
    x = tl.load(source + rows[:, None] * source_stride + columns[None, :], mask=inside, other=0.0)
    x = x.to(tl.float32)
    if normalise:
        x *= (1.0 / tl.sqrt(tl.sum(x * x, axis=1) + eps))[:, None]
    place = target + rows[:, None] * target_stride + columns[None, :]
    tl.store(place, x.to(target.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def prepare(
    x,  # [tokens, 2 * k_heads * d_k + v_heads * d_v], tokens x_stride apart
    a,  # [tokens, v_heads], tokens a_stride apart
    b,  # [tokens, v_heads], tokens b_stride apart
    log_rate,  # [v_heads]
    shift,  # [v_heads]
    q,  # [tokens, k_heads, d_k]
    k,  # [tokens, k_heads, d_k]
    v,  # [tokens, v_heads, d_v]
    g,  # [tokens, v_heads]
    beta,  # [tokens, v_heads]
    x_stride,
    a_stride,
    b_stride,
    tokens,
    k_heads: tl.constexpr,
    v_heads: tl.constexpr,
    d_k: tl.constexpr,
    d_v: tl.constexpr,
    normalise: tl.constexpr,
    exponentiate: tl.constexpr,
    eps: tl.constexpr,
    block_tokens: tl.constexpr,
    block_k: tl.constexpr,
    block_v: tl.constexpr,
    block_heads: tl.constexpr,
):
    """A program has a block of tokens and one head of q, of k or of v, or the gates of all heads."""
    rows = (tl.program_id(0) * block_tokens + tl.arange(0, block_tokens)).to(tl.int64)
    mask = rows < tokens
    part = tl.program_id(1)
    keys: tl.constexpr = k_heads * d_k
    if part < k_heads:
        at = part * d_k
        move_head(x + at, q + at, rows, mask, x_stride, keys, d_k, block_k, normalise, eps)
    elif part < 2 * k_heads:
        at = (part - k_heads) * d_k
        move_head(x + keys + at, k + at, rows, mask, x_stride, keys, d_k, block_k, normalise, eps)
    elif part < 2 * k_heads + v_heads:
        at = (part - 2 * k_heads) * d_v
        move_head(x + 2 * keys + at, v + at, rows, mask, x_stride, v_heads * d_v, d_v, block_v, False, eps)
    else:
        heads = tl.arange(0, block_heads)
        known = heads < v_heads
        inside = mask[:, None] & known[None, :]
        rate = tl.exp(tl.load(log_rate + heads, mask=known, other=0.0).to(tl.float32))
        bias = tl.load(shift + heads, mask=known, other=0.0).to(tl.float32)
        y = tl.load(a + rows[:, None] * a_stride + heads[None, :], mask=inside, other=0.0).to(tl.float32)
        y += bias[None, :]
        softplus = tl.maximum(y, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(y)))  # no exp of it overflows
        log_decay = -rate[None, :] * softplus
        if exponentiate:
            log_decay = tl.exp(log_decay)
        place = rows[:, None] * v_heads + heads[None, :]
        tl.store(g + place, log_decay, mask=inside)
        logit = tl.load(b + rows[:, None] * b_stride + heads[None, :], mask=inside, other=0.0)
        tl.store(beta + place, tl.sigmoid(logit.to(tl.float32)), mask=inside)


def prepare_prefill(
    conv_output: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    apply_l2norm: bool = True,
    output_g_exp: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What the delta rule of a prompt takes, from what the convolution and the projections of its layer gave.

    The parameters, their order and the results are those of vLLM's `fused_post_conv_prep`. The channels of a token
    must lie next to each other in memory; the tokens may be any distance apart.

    - conv_output: `[tokens, 2 * num_k_heads * head_k_dim + value heads * head_v_dim]`: q, k, v, head after head.
    - a, b: `[tokens, value heads]`; A_log, dt_bias: `[value heads]`.
    - Returns q and k `[tokens, num_k_heads, head_k_dim]`, of length 1 if `apply_l2norm`, and v
      `[tokens, value heads, head_v_dim]`, in the dtype of conv_output; `-exp(A_log) * softplus(a + dt_bias)`, or its
      exponential if `output_g_exp`, and `sigmoid(b)`, both `[tokens, value heads]` in float32.

    Raises ValueError if the width of conv_output is not that of the heads.
    """
    tokens, width = conv_output.shape
    v_heads = A_log.shape[0]
    expected = 2 * num_k_heads * head_k_dim + v_heads * head_v_dim
    if width != expected:
        raise ValueError(
            f"conv_output has {width} channels; {num_k_heads} key heads of {head_k_dim} and {v_heads} value heads "
            f"of {head_v_dim} need {expected}"
        )
    q, k = (conv_output.new_empty(tokens, num_k_heads, head_k_dim) for _ in "qk")
    v = conv_output.new_empty(tokens, v_heads, head_v_dim)
    g, beta = (conv_output.new_empty(tokens, v_heads, dtype=torch.float32) for _ in "gb")
    if tokens == 0:
        return q, k, v, g, beta
    prepare[triton.cdiv(tokens, BLOCK_TOKENS), 2 * num_k_heads + v_heads + 1](
        *(conv_output, a, b, A_log, dt_bias, q, k, v, g, beta),
        *(conv_output.stride(0), a.stride(0), b.stride(0), tokens),
        k_heads=num_k_heads,
        v_heads=v_heads,
        d_k=head_k_dim,
        d_v=head_v_dim,
        normalise=apply_l2norm,
        exponentiate=output_g_exp,
        eps=NORM_EPS,
        block_tokens=BLOCK_TOKENS,
        block_k=triton.next_power_of_2(head_k_dim),
        block_v=triton.next_power_of_2(head_v_dim),
        block_heads=triton.next_power_of_2(v_heads),
    )
    return q, k, v, g, beta


@cache
def say(level: int, line: str) -> None:
    """Logs a line once per process."""
    log.log(level, "Lowkey: %s", line)


def by_widths(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's preparation where it compiles, and ours for the other widths."""

    @wraps(theirs)
    def fused_post_conv_prep(
        conv_output: Tensor,
        a: Tensor,
        b: Tensor,
        A_log: Tensor,
        dt_bias: Tensor,
        num_k_heads: int,
        head_k_dim: int,
        head_v_dim: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        function = theirs
        if triton.next_power_of_2(head_k_dim) != triton.next_power_of_2(head_v_dim):
            say(logging.INFO, f"d_k {head_k_dim} with d_v {head_v_dim}: Lowkey's kernel prepares prefill")
            function = prepare_prefill
        return function(
            conv_output, a, b, A_log, dt_bias, num_k_heads, head_k_dim, head_v_dim, *args, **kwargs
        )

    return fused_post_conv_prep


def without_flashinfer(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's choice of a prefill, less FlashInfer where nobody asked for it and it does not take the d_k."""

    @wraps(theirs)
    def resolve(vllm_config: Any) -> Any:
        requested, active = theirs(vllm_config)
        d_k = getattr(vllm_config.model_config.hf_text_config, "linear_key_head_dim", None)
        if active != "flashinfer" or d_k in (None, FLASHINFER_D_K):
            return requested, active
        takes = f"FlashInfer's GDN prefill takes d_k {FLASHINFER_D_K} only, and this model has {d_k}"
        if requested == "flashinfer":
            say(logging.WARNING, f"{takes}: leave --gdn-prefill-backend out, or set it to triton")
            return requested, active
        say(logging.INFO, f"{takes}: the Triton prefill is used")
        return requested, "triton"

    return resolve


OPS = "vllm.third_party.flash_linear_attention.ops.fused_gdn_prefill_post_conv"
LAYER = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
REPLACED: dict[str, tuple[str, Sequence[str], Callable[[Callable[..., Any]], Callable[..., Any]]]] = {
    OPS: ("fused_post_conv_prep", [*inspect.signature(prepare_prefill).parameters], by_widths),
    LAYER: ("_resolve_gdn_prefill_backend", ["vllm_config"], without_flashinfer),
}
"""Modules of vLLM -> the function to replace, its parameters, and what makes the replacement of it."""


def replace(module: ModuleType) -> None:
    """Replaces the module's function, there and wherever a module of vLLM has taken it by name already."""
    name, parameters, replacement = REPLACED[module.__name__]
    theirs = getattr(module, name, None)
    found = [*inspect.signature(theirs).parameters] if callable(theirs) else None
    if found != list(parameters):
        say(logging.WARNING, f"{module.__name__}.{name} is not what it was in {known()}, and stays as it is")
        return
    ours = replacement(theirs)  # type: ignore[arg-type] # it is callable
    for key, other in [*sys.modules.items()]:
        # None may stand there for a module, and to ask one that imports lazily for an attribute might import more.
        if key.startswith("vllm.") and getattr(other, "__dict__", {}).get(name) is theirs:
            setattr(other, name, ours)


class ReplaceOnImport(MetaPathFinder):
    """Replaces the functions when their modules are imported. Importing them here would start CUDA in processes of vLLM
    that stay free of it, such as the API's."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        spec = importlib.machinery.PathFinder.find_spec(fullname, path) if fullname in REPLACED else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_replace(module: ModuleType) -> None:
            execute(module)
            replace(module)

        spec.loader.exec_module = execute_and_replace  # type: ignore[method-assign] # of this spec's own loader
        return spec


def known() -> str:
    return f"{KNOWN[0]} to {KNOWN[-1]}"


def register() -> None:
    """Prepares the replacements. Does nothing without vLLM, with a version that was not read, or a second time."""
    try:
        from vllm import __version__ as installed
    except ImportError:
        return
    # Builds for other CUDA versions add a local part (0.26.0+cu129); .post releases repack the same code.
    release = re.sub(r"(\.post\d+)?(\+.*)?$", "", installed)
    if release not in KNOWN:
        say(
            logging.WARNING,
            f"the plugin was read against vLLM {known()}, this is {installed}, and nothing is changed: a Gated "
            "DeltaNet model with d_k <= 64 may not start, and on Hopper any d_k but 128 may need "
            "--gdn-prefill-backend triton; other models are not concerned",
        )
        return
    if any(isinstance(finder, ReplaceOnImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, ReplaceOnImport())
    for name in REPLACED:
        if name in sys.modules:
            replace(sys.modules[name])
