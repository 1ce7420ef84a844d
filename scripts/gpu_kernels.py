"""Kernels: right on random shapes, how close to the memory they run, and which way of launching them is the fastest."""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import triton
from gpu_common import Run, SkippedError, error, median_seconds
from torch import Tensor

from modeling.layers import DeltaMixer
from modeling.ops import RuleInputs, reference_gated_delta_rule
from modeling.runtime.gpu import delta as step_module
from modeling.runtime.gpu.delta import delta_step
from modeling.runtime.gpu.prefill import delta_gates, delta_heads, normed_output
from modeling.spec import DeltaSpec
from modeling.state import DeltaState

KERNEL_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Largest difference from float64, relative, by dtype: float32 arithmetic, and one rounding of what is stored."""
RULE_TOLERANCE = 1e-2
"""Largest difference of fla's kernels on bfloat16 inputs from float64 on the same inputs."""
BANDWIDTH_GOAL = 1.25
"""A step's time over its bytes at the measured copy rate."""
VARIANTS = ((16384, 4), (16384, 8), (8192, 4), (8192, 2), (4096, 4), (4096, 2))
"""Elements of state that a program holds, and its warps. The runtime takes 16384/4 for float32 states of d_k 128, and
8192/2 for those of d_k 64 and for bfloat16. A smaller tile takes fewer registers, so that more programs run at once,
which hides more latency at small batches and narrow states; but it makes a program go over its columns more often."""


def make_mixer(spec: DeltaSpec, device: str, dtype: torch.dtype) -> DeltaMixer:
    mixer = DeltaMixer(spec, 8, 0)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.copy_(torch.randn_like(p) * 0.5 + (1 if name == "o_norm.weight" else 0))
    mixer.conv.to(dtype)
    return mixer.to(device).requires_grad_(False)


def shapes(small: bool) -> Iterator[tuple[DeltaSpec, torch.dtype, torch.dtype]]:
    """Every d_k of interest once, everything else drawn."""
    draw = random.Random(0)
    narrow, wide = torch.bfloat16, torch.float32
    for i, d_k in enumerate((5, 16, 24) if small else (16, 48, 64, 77, 96, 128, 256)):
        heads, groups = draw.choice((1, 2, 4)), draw.choice((1, 2))
        yield (
            DeltaSpec(
                num_k_heads=heads,
                num_v_heads=heads * groups,
                d_k=d_k,
                d_v=draw.choice((8, 24)) if small else draw.choice((64, 100, 128, 192, 256)),
                conv_kernel=draw.choice((2, 3, 4, 4)),
                conv_bias=draw.random() < 0.5,
                has_decay=i % 2 == 0,
                has_beta=draw.random() < 0.8,
                beta_scale=draw.choice((1.0, 2.0)),
                gate=draw.choice(("none", "silu", "sigmoid")),
                norm_eps=1e-6,
            ),
            draw.choice((narrow, wide)),
            draw.choice((narrow, wide)),
        )


def step_inputs(
    spec: DeltaSpec, batch: int, slots: int, device: str, dtype: torch.dtype, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    projected = torch.randn(batch, sum(spec.in_proj_sizes), device=device, dtype=dtype)
    recurrent = torch.randn(slots, spec.num_v_heads, spec.d_k, spec.d_v, device=device, dtype=state_dtype)
    conv = torch.randn(slots, spec.conv_channels, spec.conv_kernel - 1, device=device, dtype=dtype)
    return projected, recurrent, conv


@torch.inference_mode()
def compare_step(run: Run, spec: DeltaSpec, dtype: torch.dtype, state_dtype: torch.dtype) -> dict[str, float]:
    """Three steps of the decode kernel on random slots against DeltaMixer.step in float64: relative errors of o and of
    the states, and 0 if the histories are exact and the other slots untouched."""
    torch.manual_seed(spec.d_k)
    batch, slots = (2, 4) if run.small else (17, 40)
    mixer = make_mixer(spec, run.device, dtype)
    exact = exact_mixer(mixer)
    _, recurrent, conv = step_inputs(spec, batch, slots, run.device, dtype, state_dtype)
    at = torch.randperm(slots, device=run.device)[:batch]
    others = torch.ones(slots, dtype=torch.bool, device=run.device).index_fill(0, at, False)
    before = recurrent[others], conv[others]
    errors = {"o": 0.0, "state": 0.0, "history": 0.0, "others": 0.0}
    for _ in range(3):
        projected = torch.randn(batch, sum(spec.in_proj_sizes), device=run.device, dtype=dtype)
        wide_recurrent, wide_conv = recurrent.double(), conv.double()
        expected = exact.step(projected.double(), DeltaState(wide_recurrent, wide_conv), at)
        o = delta_step(mixer, projected, DeltaState(recurrent, conv), at)
        errors["o"] = max(errors["o"], error(o, expected))
        errors["state"] = max(errors["state"], error(recurrent, wide_recurrent))
        errors["history"] += float(not torch.equal(conv.double(), wide_conv))
    untouched = torch.equal(recurrent[others], before[0]) and torch.equal(conv[others], before[1])
    return errors | {"others": float(not untouched)}


def exact_mixer(mixer: DeltaMixer) -> DeltaMixer:
    exact = DeltaMixer(mixer.spec, 8, 0).to(mixer.conv.weight.device).double()
    exact.load_state_dict({name: p.double() for name, p in mixer.state_dict().items()})
    return exact.requires_grad_(False)


def check_step(run: Run) -> Iterator[list[str]]:
    """The decode kernel on random shapes."""
    bad, worst = 0, 0.0
    for spec, dtype, state_dtype in shapes(run.small):
        run.need(5)
        name = (
            f"step d_k {spec.d_k} d_v {spec.d_v} heads {spec.num_k_heads}/{spec.num_v_heads} "
            f"{'gated' if spec.has_decay else 'delta'} {str(dtype)[6:]} state {str(state_dtype)[6:]}"
        )
        errors = compare_step(run, spec, dtype, state_dtype)
        run.report.setdefault("kernels", {})[name] = errors
        worst = max(worst, errors["o"] / KERNEL_TOLERANCE[dtype])
        good = errors["o"] < KERNEL_TOLERANCE[dtype] and errors["state"] < KERNEL_TOLERANCE[state_dtype]
        if not good or errors["history"] or errors["others"]:
            bad += 1
            yield [name, run.check(False, name), str(errors)]
    yield ["decode step, all shapes", "FAIL" if bad else "ok", f"worst {worst:.2f} of tolerance"]


@torch.inference_mode()
def compare_inputs(run: Run, spec: DeltaSpec, dtype: torch.dtype) -> dict[str, float]:
    """Convolution (packed, ragged sequences with a history), gates and gated norm of prompts against the plain ones in
    float64."""
    torch.manual_seed(spec.d_k)
    lengths = [1, 3, 66] if run.small else [1, 2, 64, 130, 600]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    mixer = make_mixer(spec, run.device, dtype)
    projected = torch.randn(offsets[-1], sum(spec.in_proj_sizes), device=run.device, dtype=dtype)
    qkv = projected[:, : spec.conv_channels]
    history = torch.randn(
        len(lengths), spec.conv_channels, spec.conv_kernel - 1, device=run.device, dtype=dtype
    )
    exact = exact_mixer(mixer)
    expected = exact.heads(qkv.double(), offsets, history.double())
    slots = torch.arange(len(lengths), device=run.device)
    made = delta_heads(mixer, projected, offsets, history, slots)
    errors = {name: error(a, b) for name, a, b in zip("qkv", made, expected, strict=False)}
    _, gate, *gates_in = projected.double().split(spec.in_proj_sizes, dim=-1)
    for name, a, b in zip(("beta", "g"), delta_gates(mixer, projected), exact.gates(*gates_in), strict=True):
        if a is not None:
            errors[name] = error(a, b)
    o = torch.randn_like(made[2])
    errors["norm"] = error(normed_output(mixer, o, projected), exact.gated_norm(o.double(), gate))
    return errors | {"history": float(not torch.equal(made[3].double(), expected[3]))}


def check_inputs(run: Run) -> Iterator[list[str]]:
    """The kernels of ours that prompts take, on random shapes."""
    bad, worst = 0, 0.0
    for spec, dtype, _ in itertools.islice(shapes(run.small), 0, None, 2):
        run.need(3)
        errors = compare_inputs(run, spec, dtype)
        run.report.setdefault("kernels", {})[f"prompt kernels d_k {spec.d_k} {str(dtype)[6:]}"] = errors
        exact = {"beta", "g"}  # float32 whatever the dtype is
        share = max(
            e / KERNEL_TOLERANCE[torch.float32 if name in exact else dtype]
            for name, e in errors.items()
            if name != "history"
        )
        worst = max(worst, share)
        if share >= 1 or errors["history"]:
            bad += 1
            name = f"prompt kernels d_k {spec.d_k}"
            yield [name, run.check(False, name), str(errors)]
    yield ["prompt kernels, all shapes", "FAIL" if bad else "ok", f"worst {worst:.2f} of tolerance"]


def rule_shapes(run: Run) -> Iterator[tuple[bool, int, int, int, int]]:
    """Gated or not, key heads, value heads to each, d_k, d_v."""
    for gated in (True, False):
        for shape in [(1, 2, 8, 8)] if run.small else [(2, 2, 128, 128), (2, 1, 48, 128)]:
            yield (gated, *shape)


@torch.inference_mode()
def compare_rule(run: Run, gated: bool, heads: int, groups: int, d_k: int, d_v: int) -> tuple[float, float]:
    """The prefill rule on packed, ragged sequences with initial states against the float64 token loop: relative errors
    of o and of the final states."""
    lengths = [1, 64, 130, 70] if not run.small else [1, 5]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    torch.manual_seed(d_k)
    n = offsets[-1]
    narrow = torch.bfloat16 if run.cuda else torch.float32
    q, k = (
        torch.nn.functional.normalize(torch.randn(n, heads, d_k, device=run.device), dim=-1).to(narrow)
        for _ in range(2)
    )
    v = torch.randn(n, heads * groups, d_v, device=run.device).to(narrow)
    g = -3 * torch.rand(n, heads * groups, device=run.device) ** 4 if gated else None
    beta = torch.rand(n, heads * groups, device=run.device)
    initial = torch.randn(len(lengths), heads * groups, d_k, d_v, device=run.device)
    inputs = RuleInputs(q, k, v, g, beta, d_k**-0.5, offsets, initial)
    tensors = {name: x.double().cpu() for name, x in vars(inputs).items() if isinstance(x, Tensor)}
    exact = reference_gated_delta_rule(replace(inputs, **tensors))  # type: ignore[arg-type]
    ours = run.rule(inputs)
    o, state = (error(a.cpu(), b) for a, b in zip(ours, exact, strict=True))
    return o, state


def check_rule(run: Run) -> Iterator[list[str]]:
    """The prefill rule."""
    for gated, heads, groups, d_k, d_v in rule_shapes(run):
        run.need(10)
        o, state = compare_rule(run, gated, heads, groups, d_k, d_v)
        name = f"prefill rule d_k {d_k} d_v {d_v} {'gated' if gated else 'delta'}"
        run.report.setdefault("kernels", {})[name] = {"o": o, "state": state}
        yield [name, run.check(max(o, state) < RULE_TOLERANCE, name), f"o {o:.1e} state {state:.1e}"]


def copy_rate(run: Run) -> float:
    """Bytes per second of a large copy on the device, read and written bytes counted."""
    size = 2**22 if run.small else 2**31
    source = torch.randn(size // 4, device=run.device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * size / median_seconds(run, lambda: target.copy_(source), 3 if run.small else 20)


def step_bytes(spec: DeltaSpec, batch: int, state_size: int, size: int) -> int:
    """What a step must move: states and histories in and out, the projection in, o out."""
    state = spec.num_v_heads * spec.d_k * spec.d_v * state_size
    history = spec.conv_channels * (spec.conv_kernel - 1) * size
    return batch * (2 * state + 2 * history + (sum(spec.in_proj_sizes) + spec.value_dim) * size)


def large_mixer(run: Run, d_k: int) -> DeltaSpec:
    heads, width = (2, 16) if run.small else (16, 128)
    return DeltaSpec(
        num_k_heads=heads,
        num_v_heads=heads,
        d_k=d_k // (8 if run.small else 1),
        d_v=width,
        conv_kernel=4,
        conv_bias=False,
        has_decay=True,
        has_beta=True,
        beta_scale=1.0,
        gate="silu",
        norm_eps=1e-6,
    )


@torch.inference_mode()
def time_step(
    run: Run, d_k: int, batch: int, state_dtype: torch.dtype, layers: int | None = None
) -> dict[str, float]:
    """One decode step of one layer, over as many layers' pools as it takes for the cache to hold none of them."""
    spec = large_mixer(run, d_k)
    mixer = make_mixer(spec, run.device, torch.bfloat16)
    moved = step_bytes(spec, batch, state_dtype.itemsize, 2)
    layers = layers or (2 if run.small else max(3, 600_000_000 // moved))
    inputs = [step_inputs(spec, batch, batch, run.device, torch.bfloat16, state_dtype) for _ in range(layers)]
    slots = torch.randperm(batch, device=run.device)

    def all_layers() -> None:
        for projected, *state in inputs:
            delta_step(mixer, projected, DeltaState(*state), slots)

    all_layers()
    replay = all_layers
    if run.cuda:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            all_layers()
        replay = graph.replay
    for _ in range(3):
        replay()
    taken = median_seconds(run, replay, 3 if run.small else 20) / layers
    return {"microseconds": taken * 1e6, "bytes": moved, "bytes_per_second": moved / taken}


@contextmanager
def launched_as(tile: int, warps: int) -> Iterator[None]:
    """The decode kernel with another tile and number of warps."""
    sizes = dict.fromkeys(step_module.TILES, tile)
    with (
        patch.object(step_module, "TILES", sizes),
        patch.object(step_module, "ELEMENTS_PER_WARP", tile // warps),
    ):
        yield


def variants(run: Run, d_k: int) -> list[tuple[int, int]]:
    """Those of `VARIANTS` that differ: a program holds no more than the whole state of a head."""
    spec = large_mixer(run, d_k)
    most = triton.next_power_of_2(spec.d_k) * triton.next_power_of_2(spec.d_v)
    found = list(dict.fromkeys((min(tile, most), warps) for tile, warps in VARIANTS))
    return found[:2] if run.small else found


def own_variant(run: Run, d_k: int, state_dtype: torch.dtype) -> str:
    """The one that the runtime takes."""
    spec = large_mixer(run, d_k)
    most = triton.next_power_of_2(spec.d_k) * triton.next_power_of_2(spec.d_v)
    tile = min(step_module.TILES[state_dtype.itemsize], most)
    return f"{tile}/{max(tile // step_module.ELEMENTS_PER_WARP, 1)}"


def check_tuning(run: Run) -> Iterator[list[str]]:
    """Which tile and how many warps, for each kind of state; the runtime's own choice is what `bandwidth` shows."""
    rate = run.report.get("bandwidth", {}).get("copy_bytes_per_second")
    if rate is None:
        raise SkippedError("skipped: no copy was measured")
    results = run.report.setdefault("tuning", {})
    kinds = list(itertools.product((torch.bfloat16, torch.float32), (64, 128)))
    for state_dtype, d_k in kinds[:1] if run.small else kinds:
        for batch in (2,) if run.small else (64, 128):
            ratios: dict[str, float] = {}
            for tile, warps in variants(run, d_k):
                run.need(2)
                with launched_as(tile, warps):
                    figures = time_step(run, d_k, batch, state_dtype)
                ratios[f"{tile}/{warps}"] = rate / figures["bytes_per_second"]
                results[f"d_k {d_k} B {batch} state {str(state_dtype)[6:]}"] = ratios
            best = min(ratios, key=ratios.__getitem__)
            told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
            told += f"; the runtime takes {own_variant(run, d_k, state_dtype)}"
            yield [f"tile/warps d_k {d_k} B {batch} state {str(state_dtype)[6:]}", f"best {best}", told]


def check_bandwidth(run: Run) -> Iterator[list[str]]:
    rate = copy_rate(run)
    results: dict[str, Any] = {"copy_bytes_per_second": rate}
    run.report["bandwidth"] = results
    yield ["copy", "", f"{rate / 1e9:.0f} GB/s"]
    for state_dtype in (torch.float32, torch.bfloat16):
        for d_k in (128, 64):
            for batch in (2,) if run.small else (64, 128, 256, 512):
                run.need(3)
                figures = time_step(run, d_k, batch, state_dtype)
                ratio = rate / figures["bytes_per_second"]
                name = f"step d_k {d_k} B {batch} state {str(state_dtype)[6:]}"
                results[name] = figures | {"over_bound": ratio}
                details = [
                    f"{figures['microseconds']:.1f} us",
                    f"{figures['bytes_per_second'] / 1e9:.0f} GB/s",
                    f"{ratio:.2f} x bound",
                ]
                within = "within" if ratio <= BANDWIDTH_GOAL else "over"
                yield [name, "" if run.small else within, ", ".join(details)]
