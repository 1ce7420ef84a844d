"""Whether `fla_gated_delta_rule` launches fla's kernels as fla's own function does, as a script of its own on a machine
without a GPU: `fla_launches.py`. Nothing runs; each launch is written down with its arguments.

Triton's interpreter can't run these kernels, so this is what a CPU can tell of our launches.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from compile_ahead import pretend_h100
from torch import Tensor
from triton.runtime.jit import JITFunction


@contextmanager
def caught(inputs: dict[str, Tensor]) -> Iterator[list[dict[str, Any]]]:
    """Within, a launch only adds its kernel, grid and arguments to the list. A tensor is told by its dtype, its number
    of elements, and its name among the inputs, or else the kernel and the argument that had it first."""
    found: list[dict[str, Any]] = []
    names = {t.data_ptr(): name for name, t in inputs.items()}
    kept = []  # so that no tensor gets the memory of an earlier one

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        told = {"kernel": kernel.__name__, "grid": (grid(values) if callable(grid) else grid)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                assert value.is_contiguous()
                kept.append(value)
                first = names.setdefault(value.data_ptr(), f"{kernel.__name__}.{name}")
                told[name] = first, value.dtype, value.numel()
            else:
                told[name] = round(value, 6) if isinstance(value, float) else value
        found.append(told)

    with patch.object(JITFunction, "run", run):
        yield found


def main() -> None:
    pretend_h100()
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    from modeling.ops import RuleInputs
    from modeling.runtime.gpu import fla_kernels
    from modeling.runtime.gpu.fla_rule import fla_gated_delta_rule
    from modeling.runtime.gpu.packing import packing

    fla_kernels.use_fixed((9, 0))
    for k_heads, v_heads, d_k, d_v in ((2, 2, 64, 64), (2, 4, 48, 100), (1, 3, 130, 24)):
        offsets = [0, 3, 70, 134]
        q, k = (torch.zeros(134, k_heads, d_k).bfloat16() for _ in range(2))
        v = torch.zeros(134, v_heads, d_v).bfloat16()
        g, beta = torch.zeros(134, v_heads), torch.zeros(134, v_heads)
        state = torch.zeros(3, v_heads, d_k, d_v)
        packed = packing(offsets, v.device)
        inputs = dict(q=q, k=k, v=v, g=g, beta=beta, state=state, at=packed.offsets, chunks=packed.chunks)
        rule_inputs = RuleInputs(q, k, v, g, beta, 0.125, offsets, state)
        with caught(inputs) as ours:
            fla_gated_delta_rule(rule_inputs)
        with caught(inputs) as theirs:
            chunk_gated_delta_rule(
                q[None],
                k[None],
                v[None],
                g[None],
                beta[None],
                scale=0.125,
                initial_state=state,
                output_final_state=True,
                cu_seqlens=packed.offsets,
                chunk_indices=packed.chunks,
            )
        for a, b in zip(ours, theirs, strict=True):
            different = {name: (a.get(name), b.get(name)) for name in a | b if a.get(name) != b.get(name)}
            assert not different, (a["kernel"], different)
        print(*(launch["kernel"] for launch in ours))
    for refused in (
        {"q": q.float()},
        {"g": g.bfloat16()},
        {"v": v.transpose(0, 1).contiguous().transpose(0, 1)},
        {"k": torch.zeros(134, k_heads, 257).bfloat16()},
    ):
        try:
            fla_gated_delta_rule(replace(rule_inputs, **refused))
        except ValueError as e:
            print("refused:", e)


if __name__ == "__main__":
    main()
