"""Compile a model's kernels ahead for an H100 on a machine without a GPU, as a script of its own: `compile_ahead.py`.

Triton is given a driver that knows the card and can't launch anything, so that a launch that is really made fails.
"""

import logging
import os
import time
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

launchers: list[str] = []
parsing: list[str] = []
"""Functions that are being parsed now."""
together: set[str] = set()
"""Functions that were parsed while another one was."""


class Utilities:
    @staticmethod
    def get_device_properties(_: int) -> dict[str, int]:
        return {"multiprocessor_count": 132, "max_shared_mem": 232448}


class Driver:
    """An H100 that is not there."""

    utils = Utilities

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int | None = None) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> None:
        launchers.append(metadata.name)


def pretend_h100() -> None:
    """Before fla is imported."""
    driver.set_active(Driver())
    torch.cuda.get_device_name = lambda *_: "NVIDIA H100"
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.device_count = lambda: 1


def parse_slowly() -> None:
    """Have two threads that parse at once be seen to do so."""
    parse = JITFunction.parse

    def slowly(self: JITFunction[Any]) -> Any:
        parsing.append(self.fn.__name__)
        together.update(parsing if len(parsing) > 1 else ())
        time.sleep(0.02)
        try:
            return parse(self)
        finally:
            parsing.remove(self.fn.__name__)

    JITFunction.parse = slowly


def main() -> None:
    pretend_h100()
    parse_slowly()

    from specs import mixer_spec

    from modeling.model import Model
    from modeling.runtime.gpu import fla_kernels
    from modeling.runtime.gpu.fla_rule import fla_gated_delta_rule
    from modeling.runtime.gpu.runtime import GpuRuntime
    from modeling.spec import LayerSpec, MLPSpec, ModelSpec, NormSpec, StateTypes
    from modeling.state import StatePool

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    before = fla_kernels.use_fixed((9, 0))
    print("tuned", *(f"{name}={len(configs)}" for name, configs in before.items()))
    spec = mixer_spec(num_k_heads=2, num_v_heads=2, d_k=64, d_v=64, gate="silu", norm_eps=1e-6)
    norm = NormSpec(eps=1e-6)
    layer = LayerSpec(mixer=spec, ffn=MLPSpec(intermediate_size=64), norm=norm)
    model = Model(ModelSpec("test", 64, 32, (layer,) * 3, norm, True, 64, ())).requires_grad_(False)
    for p in model.parameters():
        if p.ndim == 2:
            p.data = p.data.bfloat16()
    pool = StatePool(model.spec, 2, types=StateTypes(torch.float32, torch.bfloat16))
    runtime = GpuRuntime(model, fla_gated_delta_rule)

    def work() -> None:
        runtime.prefill(torch.zeros(70, dtype=torch.long), [0, 3, 70], pool, torch.arange(2))
        runtime.decode(torch.zeros(2, dtype=torch.long), pool, torch.arange(2))

    with torch.inference_mode():
        runtime.compile_ahead(work)
        print("compiled", *sorted(launchers))
        print("together", *sorted(together))
        launchers.clear()
        runtime.compile_ahead(work)
        print("again", *launchers)
        chosen = next(iter(before))
        fla_kernels.use({chosen: before[chosen][:2]})
        runtime.compile_ahead(work)
        print("more", *launchers)

    fla_kernels.use(before)
    fla_kernels.FIXED[9, 0] = {chosen: {"num_warps": 99}, "chunk_fwd_kernel_o": {"BK": 64, "BV": 64}}
    print("other", *fla_kernels.use_fixed((9, 0)), *fla_kernels.use_fixed((7, 5)))

    @triton.jit
    def broken(x):
        no_such_name(x)  # noqa: F821

    def fails() -> None:
        broken[(1,)](torch.zeros(1))

    runtime.compile_ahead(fails)
    try:
        fails()
    except triton.CompilationError as e:
        print("launched", type(e).__name__)


if __name__ == "__main__":
    main()
