"""Kernels: right on random shapes, and how close to the memory they run."""

import random
from collections.abc import Iterator
from typing import Any

import torch
from gpu_common import Run, error, median_seconds
from torch import Tensor

from modeling.layers import Mixer
from modeling.ops import reference_gated_delta_rule
from modeling.ops.triton_step import triton_step
from modeling.spec import MixerSpec

KERNEL_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
"""Relative to float64: float32 arithmetic, and one rounding of what is stored."""
RULE_TOLERANCE = 1e-2
"""fla's kernels on bfloat16 inputs, against float64 on the same inputs."""
BANDWIDTH_GOAL = 1.25
"""A step's time over its bytes at the measured copy rate."""


def make_mixer(spec: MixerSpec, device: str, dtype: torch.dtype) -> Mixer:
    mixer = Mixer(spec, 8, 0)
    with torch.no_grad():
        for name, p in mixer.named_parameters():
            p.copy_(torch.randn_like(p) * 0.5 + (1 if name == "o_norm.weight" else 0))
    mixer.conv.to(dtype)
    return mixer.to(device).requires_grad_(False)


def shapes(small: bool) -> Iterator[tuple[MixerSpec, torch.dtype, torch.dtype]]:
    """Every d_k of interest once, everything else drawn."""
    draw = random.Random(0)
    narrow, wide = torch.bfloat16, torch.float32
    for i, d_k in enumerate((5, 16, 24) if small else (16, 32, 48, 64, 77, 96, 128, 192, 256, 128)):
        heads, groups = draw.choice((1, 2, 4)), draw.choice((1, 2))
        yield (
            MixerSpec(
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
    spec: MixerSpec, batch: int, slots: int, device: str, dtype: torch.dtype, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    projected = torch.randn(batch, sum(spec.in_proj_sizes), device=device, dtype=dtype)
    recurrent = torch.randn(slots, spec.num_v_heads, spec.d_k, spec.d_v, device=device, dtype=state_dtype)
    conv = torch.randn(slots, spec.conv_channels, spec.conv_kernel - 1, device=device, dtype=dtype)
    return projected, recurrent, conv


@torch.inference_mode()
def check_step(run: Run) -> Iterator[list[str]]:
    """Three steps of the decode kernel on random slots against Mixer.step in float64; other slots untouched."""
    good_so_far, worst = True, 0.0
    for spec, dtype, state_dtype in shapes(run.small):
        run.need(5)
        torch.manual_seed(spec.d_k)
        batch, slots = (2, 4) if run.small else (17, 40)
        mixer = make_mixer(spec, run.device, dtype)
        exact = Mixer(spec, 8, 0).to(run.device).double()
        exact.load_state_dict({name: p.double() for name, p in mixer.state_dict().items()})
        _, recurrent, conv = step_inputs(spec, batch, slots, run.device, dtype, state_dtype)
        at = torch.randperm(slots, device=run.device)[:batch]
        others = torch.ones(slots, dtype=torch.bool, device=run.device).index_fill(0, at, False)
        before = recurrent[others], conv[others]
        errors: dict[str, float] = {"o": 0.0, "state": 0.0}
        moved = True
        for _ in range(3):
            projected = torch.randn(batch, sum(spec.in_proj_sizes), device=run.device, dtype=dtype)
            wide_recurrent, wide_conv = recurrent.double(), conv.double()
            expected = exact.step(projected.double(), wide_recurrent, wide_conv, at)
            o = triton_step(mixer, projected, recurrent, conv, at)
            errors["o"] = max(errors["o"], error(o, expected))
            errors["state"] = max(errors["state"], error(recurrent, wide_recurrent))
            moved &= torch.equal(conv.double(), wide_conv)
        untouched = torch.equal(recurrent[others], before[0]) and torch.equal(conv[others], before[1])
        name = (
            f"step d_k {spec.d_k} d_v {spec.d_v} heads {spec.num_k_heads}/{spec.num_v_heads} "
            f"{'gated' if spec.has_decay else 'delta'} {str(dtype)[6:]} state {str(state_dtype)[6:]}"
        )
        good = (
            errors["o"] < KERNEL_TOLERANCE[dtype]
            and errors["state"] < KERNEL_TOLERANCE[state_dtype]
            and moved
            and untouched
        )
        run.report.setdefault("kernels", {})[name] = errors | {"conv": moved, "others untouched": untouched}
        worst = max(worst, errors["o"] / KERNEL_TOLERANCE[dtype])
        good_so_far &= good
        if not good:
            yield [name, run.check(False, name), str(errors)]
    yield ["decode step, all shapes", "ok" if good_so_far else "FAIL", f"worst {worst:.2f} of tolerance"]


@torch.inference_mode()
def check_rule(run: Run) -> Iterator[list[str]]:
    """The prefill rule on packed, ragged sequences with initial states against the float64 token loop."""
    lengths = [1, 64, 130, 70] if not run.small else [1, 5]
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    for gated in (True, False):
        for heads, groups, d_k, d_v in [(1, 2, 8, 8)] if run.small else [(2, 2, 128, 128), (2, 1, 48, 128)]:
            run.need(20)
            torch.manual_seed(d_k)
            n = offsets[-1]
            narrow = torch.bfloat16 if run.cuda else torch.float32
            q, k = (
                torch.nn.functional.normalize(torch.randn(n, heads, d_k, device=run.device), dim=-1).to(
                    narrow
                )
                for _ in range(2)
            )
            v = torch.randn(n, heads * groups, d_v, device=run.device).to(narrow)
            g = -3 * torch.rand(n, heads * groups, device=run.device) ** 4 if gated else None
            beta = torch.rand(n, heads * groups, device=run.device)
            initial = torch.randn(len(lengths), heads * groups, d_k, d_v, device=run.device)
            exact = reference_gated_delta_rule(
                *(None if x is None else x.double().cpu() for x in (q, k, v, g, beta)),  # type: ignore[arg-type]
                scale=d_k**-0.5,
                cu_seqlens=offsets,
                initial_state=initial.double().cpu(),
            )
            ours = run.backend.rule(
                q, k, v, g, beta, scale=d_k**-0.5, cu_seqlens=offsets, initial_state=initial
            )
            o, state = (error(a.cpu(), b) for a, b in zip(ours, exact, strict=True))
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


def step_bytes(spec: MixerSpec, batch: int, state_size: int, size: int) -> int:
    """What a step must move: states and histories in and out, the projection in, o out."""
    state = spec.num_v_heads * spec.d_k * spec.d_v * state_size
    history = spec.conv_channels * (spec.conv_kernel - 1) * size
    return batch * (2 * state + 2 * history + (sum(spec.in_proj_sizes) + spec.value_dim) * size)


def large_mixer(run: Run, d_k: int) -> MixerSpec:
    heads, width = (2, 16) if run.small else (16, 128)
    return MixerSpec(
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
def time_step(run: Run, d_k: int, batch: int, state_dtype: torch.dtype) -> dict[str, float]:
    """One decode step of one layer, over as many layers' pools as it takes for the cache to hold none of them."""
    spec = large_mixer(run, d_k)
    mixer = make_mixer(spec, run.device, torch.bfloat16)
    moved = step_bytes(spec, batch, state_dtype.itemsize, 2)
    layers = 2 if run.small else max(3, 600_000_000 // moved)
    inputs = [step_inputs(spec, batch, batch, run.device, torch.bfloat16, state_dtype) for _ in range(layers)]
    slots = torch.randperm(batch, device=run.device)

    def all_layers() -> None:
        for layer in inputs:
            triton_step(mixer, *layer, slots)

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


def check_bandwidth(run: Run) -> Iterator[list[str]]:
    rate = copy_rate(run)
    results: dict[str, Any] = {"copy_bytes_per_second": rate}
    run.report["bandwidth"] = results
    yield ["copy", "", f"{rate / 1e9:.0f} GB/s"]
    for state_dtype in (torch.float32, torch.bfloat16):
        for d_k in (128, 64):
            for batch in (1, 2) if run.small else (64, 128, 256, 512):
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
