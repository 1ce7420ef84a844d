"""Compile our Triton kernels for an H100 on a machine without a GPU, as a script of its own: the interpreter that the
tests use runs much that the compiler refuses (a variable that changes its type within an `if`, for one).

Each kernel is compiled as the runtime would launch it: the launch is caught, and the kernel's signature made of the
arguments.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from specs import mixer_spec
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling import vllm_plugin
from modeling.model import Model
from modeling.ops import chunked_gated_delta_rule
from modeling.runtime.gpu import delta, delta_int8, norms, prefill, products, rounding
from modeling.runtime.gpu.runtime import GpuRuntime
from modeling.spec import LayerSpec, MLPSpec, ModelSpec, NormSpec, StateTypes
from modeling.state import StatePool

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
}
PLUGIN_WIDTHS = ((64, 128), (32, 128), (96, 192), (48, 192), (16, 128), (80, 128), (128, 128), (24, 128))
"""d_k and d_v of the models that vLLM runs with our plugin, and odd ones."""
H100 = GPUTarget("cuda", 90, 32)


class Caught:
    """In the place of a kernel."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, num_warps=4, **constants):
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
        compiled = triton.compile(source, target=H100, options={"num_warps": num_warps})
        print(self.kernel.__name__, len(compiled.asm["cubin"]))


def main() -> None:
    for module, names in (
        (delta, ["mixer_step"]),
        (delta_int8, ["convolve_step", "move_states_on"]),
        (prefill, ["convolve_packed", "gated_norm", "gates"]),
        (rounding, ["narrow_rows", "widen_rows"]),
        (norms, ["rms_norm"]),
        (products, ["swiglu"]),
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
            runtime.decode(torch.arange(2), pool, torch.arange(2))
    for d_k, d_v in PLUGIN_WIDTHS:
        for tokens, k_heads, v_heads in ((1, 2, 2), (64, 16, 48)):
            bfloat16 = torch.bfloat16
            conv_output = torch.zeros(tokens, 2 * k_heads * d_k + v_heads * d_v, dtype=bfloat16)
            gates = torch.zeros(tokens, 2 * v_heads, dtype=bfloat16).chunk(2, 1)
            rates = torch.zeros(v_heads), torch.zeros(v_heads, dtype=bfloat16)
            vllm_plugin.prepare_prefill(conv_output, *gates, *rates, k_heads, d_k, d_v)


if __name__ == "__main__":
    main()
