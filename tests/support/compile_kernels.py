"""Compile our Triton kernels for an H100 on a machine without a GPU, as a script of its own: the interpreter that the
tests use runs much that the compiler refuses (a variable that changes its type within an `if`, for one).

Each kernel is compiled as the runtime would launch it: the launch is caught, and the kernel's signature made of the
arguments. With --every each is compiled in all its variants.
"""

import os
import re
import subprocess
import sys
import tempfile

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from specs import mixer_spec
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling import vllm_plugin
from modeling.layers import AttentionMixer, MoE, RMSNorm
from modeling.model import Model
from modeling.ops import chunked_gated_delta_rule
from modeling.runtime.gpu import attention, delta, delta_int8, moe, norms, prefill, products, rounding
from modeling.runtime.gpu.runtime import SHARED_MEMORY, GpuRuntime
from modeling.spec import (
    AttentionSpec,
    LayerSpec,
    MLPSpec,
    ModelSpec,
    MoESpec,
    NormSpec,
    RopeSpec,
    StateTypes,
)
from modeling.state import PagedKV, Pages, StatePool

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}
PLUGIN_WIDTHS = ((64, 128), (32, 128), (96, 192), (48, 192), (16, 128), (80, 128), (128, 128), (24, 128))
"""d_k and d_v of the models that vLLM runs with our plugin, and odd ones."""
ATTENTION = (
    (AttentionSpec(16, 4, 256, RopeSpec(64, 1e7), "head", True, 1e-6), torch.bfloat16),
    (AttentionSpec(30, 30, 128, None, "whole", False, 1e-6), torch.bfloat16),
    (AttentionSpec(6, 2, 24, RopeSpec(12, 1e4), "none", True, 1e-6), torch.float32),
)
"""The attention of Qwen3.5-4B and of OLMo-Hybrid-7B, and an odd one."""
H100 = GPUTarget("cuda", 90, 32)
STACK = {"prepare_heads": 32, "attend_packed": 64, "attend_step": 32}
"""Bytes that a thread may have in memory: for sines of angles over 100,000, which the library has a slow way for; for
addresses and row numbers, which wait there while heads of 256 channels are in the registers (the loops over blocks have
none of it)."""


class Caught:
    """In the place of a kernel."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, num_stages=3, maxnreg=None, **constants):
        names = self.kernel.arg_names
        values = dict(zip(names, args, strict=False)) | constants
        assert list(values) == names, "the launch and the kernel disagree about their arguments"
        fixed = {p.name for p in self.kernel.params if p.is_constexpr}
        free = {p.name for p in self.kernel.params if p.do_not_specialize}
        unaligned = {p.name for p in self.kernel.params if p.do_not_specialize_on_alignment}
        signature, constexprs, attributes = {}, {}, {}
        for i, (name, value) in enumerate(values.items()):
            if name in fixed or value is None or (isinstance(value, int) and value == 1 and name not in free):
                signature[name], constexprs[i,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                if name not in unaligned:
                    attributes[i,] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0 and name not in free:
                    attributes[i,] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constexprs, attrs=attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
        compiled = triton.compile(source, target=H100, options=options)
        name, cubin = self.kernel.__name__, compiled.asm["cubin"]
        assert compiled.metadata.shared <= SHARED_MEMORY, f"{name} takes {compiled.metadata.shared} bytes"
        assert stack_bytes(cubin) <= STACK.get(name, 0), f"{name} does not have enough registers"
        print(name, len(cubin))


def stack_bytes(cubin):
    """Bytes of a thread that are in memory, since its registers do not hold them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return max(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


def compile_experts(every):
    """At the sizes of a real model: each way, with `every` tile or one."""
    more = ((1024, torch.bfloat16), (9000, torch.bfloat16), (9, torch.float32)) if every else ()
    for rows, dtype in ((1, torch.bfloat16), (64, torch.bfloat16), *more):
        with torch.device("meta"):
            experts = MoE(MoESpec(256, 8, 512, 512), 2048).to(dtype).requires_grad_(False)
            x, norm = torch.empty(rows, 2048, dtype=dtype), RMSNorm(2048, 1e-6).requires_grad_(False)
        moe.add_moe(experts, x, norm, x)


def compile_products():
    """One row, at the sizes of a real model."""
    norm = RMSNorm(2560, 1e-6).requires_grad_(False)
    with torch.device("meta"):
        x, inner = (torch.empty(1, width, dtype=torch.bfloat16) for width in (2560, 9216))
        mlp_in, mlp_out, mixer_in, reduced_in = (
            torch.empty(size, width, dtype=torch.bfloat16)
            for size, width in ((18432, 2560), (2560, 9216), (12352, 2560), (10304, 2560))
        )
    products.gated_product(x, mlp_in, norm)
    products.product(inner, mlp_out, residual=torch.empty_like(x))
    products.product(x, mixer_in, norm)
    products.product(x, reduced_in, norm)
    products.product(x, mixer_in)


def main() -> None:
    for module, names in (
        (delta, ["mixer_step"]),
        (delta_int8, ["convolve_step", "move_states_on"]),
        (prefill, ["convolve_packed", "gated_norm", "gates"]),
        (rounding, ["narrow_rows", "widen_rows"]),
        (moe, ["combine", "experts_in", "experts_out", "few_in", "few_out", "few_scores", "route"]),
        (attention, ["prepare_heads", "attend_step", "join_splits", "attend_packed"]),
        (norms, ["rms_norm"]),
        (products, ["one_row", "swiglu"]),
        (vllm_plugin, ["prepare"]),
    ):
        for name in names:
            setattr(module, name, Caught(getattr(module, name)))
    for gated, d_k, bias in ((True, 16, True), (False, 12, False)):
        spec = mixer_spec(
            num_k_heads=2,
            num_v_heads=4 if gated else 2,
            d_k=d_k,
            conv_bias=bias,
            has_decay=gated,
            gate="silu" if gated else "none",
            norm_eps=1e-6,
        )
        norm = NormSpec(eps=1e-6)
        layers = tuple(
            LayerSpec(mixer=spec, ffn=MLPSpec(intermediate_size=64), norm=norm, norm_after=norm_after)
            for norm_after in (False, True)
        )
        model = Model(ModelSpec("test", 64, 32, layers, norm, True, 64, ())).requires_grad_(False)
        for p in model.parameters():
            if p.ndim == 2:
                p.data = p.data.bfloat16()
        for recurrent in (torch.int8, torch.bfloat16 if gated else torch.float32):
            pool = StatePool(model.spec, 2, types=StateTypes(recurrent, torch.bfloat16))
            runtime = GpuRuntime(model, chunked_gated_delta_rule)
            runtime.prefill(torch.zeros(70, dtype=torch.long), [0, 3, 70], pool, torch.arange(2))
            for rows in (2, 100):  # value heads in programs of their own, and in turns
                runtime.decode(torch.zeros(rows, dtype=torch.long), pool, torch.zeros(rows, dtype=torch.long))
    every = "--every" in sys.argv
    compile_experts(every)
    compile_products()
    for spec, dtype in ATTENTION if every else ATTENTION[:1]:
        mixer = AttentionMixer(spec, 8, 0).to(dtype)
        for longest in (128, 2**18) if every else (2**18,):
            # As wide a table as for pages that a state of so many tokens would have.
            pages = Pages(3, 4, longest, "cpu")
            state = PagedKV.zeros(spec, pages, StateTypes(inputs=dtype), "cpu")
            for batch in (1, 32, 256, 1000) if every else (1, 256):
                projected = torch.zeros(batch, sum(spec.in_proj_sizes), dtype=dtype)
                attention.attention_step(mixer, projected, state, torch.zeros(batch, dtype=torch.long))
        attention.attention_prompts(mixer, projected[:70], [0, 3, 70], state, torch.arange(2))
    for d_k, d_v in PLUGIN_WIDTHS:
        for tokens, k_heads, v_heads in ((1, 2, 2), (64, 16, 48)):
            bfloat16 = torch.bfloat16
            conv_output = torch.zeros(tokens, 2 * k_heads * d_k + v_heads * d_v, dtype=bfloat16)
            gates = torch.zeros(tokens, 2 * v_heads, dtype=bfloat16).chunk(2, 1)
            rates = torch.zeros(v_heads), torch.zeros(v_heads, dtype=bfloat16)
            vllm_plugin.prepare_prefill(conv_output, *gates, *rates, k_heads, d_k, d_v)


if __name__ == "__main__":
    main()
