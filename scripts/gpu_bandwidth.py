"""How close the decode kernel runs to the memory, and which way of launching it is the fastest."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import triton
from gpu_common import Run, graph_seconds, median_seconds
from gpu_kernels import large_mixer, make_mixer, random_state
from torch import Tensor

from modeling.runtime.gpu import delta as step_module
from modeling.runtime.gpu import delta_int8 as int8_module
from modeling.runtime.gpu.delta import delta_step
from modeling.spec import DeltaSpec, StateDType
from modeling.state import DeltaState

BANDWIDTH_GOALS: dict[StateDType, float] = {"float32": 1.25, "bfloat16": 1.25, "int8": 1.35}
"""A step's time over its bytes at the measured copy rate."""
VARIANTS = (
    (16384, 4),
    (16384, 8),
    (8192, 8),
    (8192, 4),
    (8192, 2),
    (4096, 4),
    (4096, 2),
    (4096, 1),
    (2048, 2),
    (2048, 1),
)
"""Elements of state that a program holds, and its warps. A smaller tile takes fewer registers, so that more programs
run at once, which hides more latency at small batches and narrow states; but it makes a program go over its columns
more often, and 2048 elements of d_k 128 are 16 columns: of int8 half of the 32 bytes that memory is read by."""


def copy_rate(run: Run) -> float:
    """Bytes per second of a large copy on the device, read and written bytes counted."""
    size = 2**22 if run.small else 2**31
    source = torch.randn(size // 4, device=run.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / median_seconds(run, lambda: target.copy_(source), 3 if run.small else 20)


def step_bytes(spec: DeltaSpec, batch: int, state: DeltaState, size: int) -> int:
    """What a step must move: all that a request's state consists of in and out, the projection in, o out."""
    return batch * (2 * state.bytes_per_row + (sum(spec.in_proj_sizes) + spec.value_dim) * size)


@torch.inference_mode()
def time_step(run: Run, d_k: int, batch: int, state_dtype: StateDType) -> dict[str, Any]:
    """One decode step of one layer, over as many layers' pools as it takes for the cache to hold none of them."""
    spec = large_mixer(run, d_k)
    mixer = make_mixer(spec, run.device, torch.bfloat16)

    def inputs() -> tuple[Tensor, DeltaState]:
        projected = torch.randn(batch, sum(spec.in_proj_sizes), device=run.device, dtype=torch.bfloat16)
        return projected, random_state(spec, batch, torch.bfloat16, state_dtype, run.device)

    made = [inputs()]
    moved = step_bytes(spec, batch, made[0][1], 2)
    layers = 2 if run.small else max(3, 600_000_000 // moved)
    made += [inputs() for _ in range(layers - 1)]
    slots = torch.randperm(batch, device=run.device)

    def all_layers() -> None:
        for projected, state in made:
            delta_step(mixer, projected, state, slots)

    taken = graph_seconds(run, all_layers, 20) / layers
    return {
        "state_dtype": state_dtype,
        "microseconds": taken * 1e6,
        "bytes": moved,
        "bytes_per_second": moved / taken,
    }


@contextmanager
def launched_as(tile: int, warps: int) -> Iterator[None]:
    """The decode kernel with another tile and number of warps."""
    sizes = dict.fromkeys(step_module.TILES, tile)
    with (
        patch.object(step_module, "TILES", sizes),
        patch.object(step_module, "ELEMENTS_PER_WARP", tile // warps),
        patch.object(int8_module, "TILE", tile),
        patch.object(int8_module, "ELEMENTS_PER_WARP", tile // warps),
    ):
        yield


def variants(run: Run, d_k: int) -> list[tuple[int, int]]:
    """Those of `VARIANTS` that differ: a program holds no more than the whole state of a head."""
    spec = large_mixer(run, d_k)
    most = triton.next_power_of_2(spec.d_k) * triton.next_power_of_2(spec.d_v)
    found = list(dict.fromkeys((min(tile, most), warps) for tile, warps in VARIANTS))
    return found[:2] if run.small else found


def own_variant(run: Run, d_k: int, state_dtype: StateDType) -> str:
    """The one that the runtime takes."""
    spec = large_mixer(run, d_k)
    most = triton.next_power_of_2(spec.d_k) * triton.next_power_of_2(spec.d_v)
    if state_dtype == "int8":
        largest, per_warp = int8_module.TILE, int8_module.ELEMENTS_PER_WARP
    else:
        largest, per_warp = (
            step_module.TILES[getattr(torch, state_dtype).itemsize],
            step_module.ELEMENTS_PER_WARP,
        )
    tile = min(largest, most)
    return f"{tile}/{max(tile // per_warp, 1)}"


def check_tuning(run: Run) -> Iterator[list[str]]:
    """Which tile and how many warps, for each kind of state; the runtime's own choice is what `bandwidth` shows."""
    rate = run.report.get("bandwidth", {}).get("copy_bytes_per_second") or copy_rate(run)
    results = run.report.setdefault("tuning", {})
    for state_dtype, d_k in itertools.product(run.state_dtypes, (128,) if run.small else (128, 64)):
        for batch in (2,) if run.small else (64, 512):
            name = f"d_k {d_k} B {batch} state {state_dtype}"
            ratios: dict[str, float] = {}
            results[name] = {"state_dtype": state_dtype, "over_bound": ratios}
            for tile, warps in variants(run, d_k):
                run.need(2)
                with launched_as(tile, warps):
                    figures = time_step(run, d_k, batch, state_dtype)
                ratios[f"{tile}/{warps}"] = rate / figures["bytes_per_second"]
            best = min(ratios, key=ratios.__getitem__)
            told = ", ".join(f"{way} {ratio:.2f}" for way, ratio in ratios.items())
            told += f"; the runtime takes {own_variant(run, d_k, state_dtype)}"
            yield [f"tile/warps {name}", f"best {best}", told]


def check_bandwidth(run: Run) -> Iterator[list[str]]:
    """How close to a copy's bytes per second a step runs, and how much sooner than with float32 states it is done."""
    rate = copy_rate(run)
    results: dict[str, Any] = {"copy_bytes_per_second": rate}
    run.report["bandwidth"] = results
    yield ["copy", "", f"{rate / 1e9:.0f} GB/s"]
    for state_dtype, d_k in itertools.product(run.state_dtypes, (128, 64)):
        for batch in (2,) if run.small else (64, 128, 256, 512):
            run.need(3)
            figures = time_step(run, d_k, batch, state_dtype)
            ratio = figures["over_bound"] = rate / figures["bytes_per_second"]
            kind = f"step d_k {d_k} B {batch} state"
            results[f"{kind} {state_dtype}"] = figures
            details = [
                f"{figures['microseconds']:.1f} us",
                f"{figures['bytes_per_second'] / 1e9:.0f} GB/s",
                f"{ratio:.2f} x bound",
            ]
            widest = results.get(f"{kind} float32")
            if widest and state_dtype != "float32":
                figures["over_float32"] = widest["microseconds"] / figures["microseconds"]
                details.append(
                    f"{figures['over_float32']:.2f} x as fast as float32, "
                    f"{widest['bytes'] / figures['bytes']:.2f} by the bytes"
                )
            within = "within" if ratio <= BANDWIDTH_GOALS[state_dtype] else "over"
            yield [f"{kind} {state_dtype}", "" if run.small else within, ", ".join(details)]
