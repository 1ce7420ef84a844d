"""What a command is going to do and what it takes, said before it does it.

Sizes are computed from shapes. Time is measured: one window through one layer of the checkpoint's shapes, on the device
that the real work runs on.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.model import Model
from modeling.spec import ModelSpec
from pruning.calibration import BATCH
from pruning.collection import Collector, zeros
from pruning.errors import PruningError
from pruning.gradients import add_gradients, need_gradients
from pruning.statistics import StatisticName, shapes
from pruning.views import change, width

PROCESS_BYTES = 400 * 10**6
"""Python, torch and what it loads."""


def in_units(size: float) -> str:
    """Bytes for people: `26.3 MB`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size:.0f} bytes"


def parameter_count(spec: ModelSpec) -> int:
    """Parameters of the model, tied ones once."""
    with torch.device("meta"):
        return sum(p.numel() for p in Model(spec).parameters())


def statistics_bytes(spec: ModelSpec, names: Collection[StatisticName]) -> int:
    """Size of the statistics, in memory and as a file."""
    return 8 * sum(torch.Size(shape).numel() for layer in shapes(spec, names) for shape in layer.values())


def activation_bytes(spec: ModelSpec, length: int, *, gradients: bool) -> int:
    """Upper bound of what one step holds beside weights and statistics: a batch forward, or one window with autograd.

    Counted in tensors of `modeling.layers` and `modeling.ops.chunked` that are alive together, in float32.
    """
    mixer, mlp = [], []
    for layer in spec.layers:
        m, hidden = layer.mixer, spec.hidden_size
        chunked = m.num_v_heads * (4 * 64 + 5 * (m.d_k + m.d_v))
        # The last term: float64 rows of the Grams, raw and normalised.
        mixer.append(3 * hidden + sum(m.in_proj_sizes) + 4 * m.conv_channels + chunked + 4 * 2 * m.key_dim)
        mlp.append(3 * hidden + 5 * layer.mlp.intermediate_size)
    forward = BATCH * length * max(*mixer, *mlp)
    if not gradients:
        return 4 * forward
    logits = 3 * length * spec.vocab_size
    weights = sum(sum(layer.mixer.in_proj_sizes) for layer in spec.layers) * spec.hidden_size
    return 4 * max(forward, length * (sum(mixer) + sum(mlp)) + logits + weights)


def calibration_bytes(spec: ModelSpec, names: Collection[StatisticName], length: int) -> tuple[int, int, int]:
    """What calibration holds beside `PROCESS_BYTES`: weights in float32, activations, statistics."""
    active = activation_bytes(spec, length, gradients=need_gradients(names))
    return 4 * parameter_count(spec), active, statistics_bytes(spec, names)


def calibration_lines(
    spec: ModelSpec, names: Collection[StatisticName], windows: Tensor, device: torch.device
) -> Iterator[str]:
    """Passes, memory and time of collecting `names` on `windows` `[count, length]`."""
    count, length = windows.shape
    passes = "forward, then forward and backward" if need_gradients(names) else "forward"
    yield f"calibration: {windows.numel():,} tokens, {count} windows of {length}; {passes}"
    weights, active, held = calibration_bytes(spec, names, length)
    yield (
        f"memory: about {in_units(PROCESS_BYTES + weights + held + active)} (weights in float32 "
        f"{in_units(weights)}, activations {in_units(active)}, statistics {in_units(held)})"
    )
    seconds = count * window_seconds(spec, names, length, device)
    yield f"time: about {duration(seconds)} on {device}, by one window through one layer"


def window_seconds(
    spec: ModelSpec, names: Collection[StatisticName], length: int, device: torch.device
) -> float:
    """Seconds that one window takes, from a run of each kind of layer with made-up weights."""
    total = 0.0
    for layer, count in Counter(spec.layers).items():
        one = replace(spec, layers=(layer,), vocab_size=8, eos_token_ids=())
        with device:
            model = Model(one)
            windows = torch.zeros(1, length, dtype=torch.long)
        model.eval().requires_grad_(False)
        for p in model.parameters():
            p.fill_(0.01)
        total += count * _seconds(partial(_run, model, windows, names), device)
    if need_gradients(names):
        total += _seconds(partial(_head, spec, length, device), device)
    return total


def _run(model: Model, windows: Tensor, names: Collection[StatisticName]) -> None:
    layers = zeros(model.spec, names)
    with torch.no_grad():
        model(windows.flatten(), [0, windows.numel()], tap=Collector(layers).tap if names else None)
    if need_gradients(names):
        for _ in add_gradients(model, windows, layers):
            pass


def _head(spec: ModelSpec, length: int, device: torch.device) -> None:
    weight = torch.zeros(spec.vocab_size, spec.hidden_size, device=device)
    hidden = torch.zeros(length, spec.hidden_size, device=device, requires_grad=True)
    targets = torch.zeros(length, dtype=torch.long, device=device)
    F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum").backward()


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of the second of two runs: the first one pays for what is only made once."""
    for _ in range(2):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds


def duration(seconds: float) -> str:
    """`12 s`, `3 min` or `2.5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "1 s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def shape_lines(spec: ModelSpec) -> Iterator[str]:
    """What the checkpoint is."""
    m = spec.layers[0].mixer
    yield (
        f"{spec.family}: {len(spec.layers)} layers, hidden {spec.hidden_size}, {m.num_k_heads} key and "
        f"{m.num_v_heads} value heads, d_k {width(spec.d_k)}, d_v {m.d_v}, {parameter_count(spec):,} parameters, "
        f"state per request {spec.state_bytes():,} bytes"
    )


def reduction_lines(spec: ModelSpec, widths: Sequence[int]) -> Iterator[str]:
    """Widths and state before and after."""
    before, after = spec.state_bytes(), spec.with_d_k(tuple(widths)).state_bytes()
    yield (
        f"d_k {width(spec.d_k)} => {width(widths)}, "
        f"state per request {before:,} => {after:,} bytes ({change(before, after)})"
    )
    yield from width_notes(spec.d_k, widths)


def budget_line(spec: ModelSpec, passes: int, limit: int, windows: Tensor, device: torch.device) -> str:
    """What measuring each layer takes."""
    seconds = passes * len(windows) * window_seconds(spec, (), windows.shape[1], device)
    return (
        f"widths: measured per layer for at most {limit:,} bytes of state, {passes} forward passes over "
        f"{windows.numel():,} tokens, about {duration(seconds)}"
    )


def width_notes(before: Sequence[int], after: Sequence[int]) -> Iterator[str]:
    """Which kernels the new widths lose, from what third-party kernels are made for (docs/pruning.md, Widths)."""
    new = sorted(set(after) - set(before))
    odd = [n for n in new if n % 16]
    padded = [n for n in new if n % 16 == 0 and n & (n - 1)]
    if odd:
        yield f"note: {_listed(odd)}: no multiple of 16, tensor cores pad it; 16, 32, 64 and 96 waste nothing"
    if padded:
        yield (
            f"note: {_listed(padded)}: decode kernels pad to the next power of two; the state shrinks, "
            "its arithmetic less so"
        )
    if 128 in before and new:
        yield (
            f"note: {_listed(new)}: fused kernels that are made for d_k 128 alone (FlashInfer's) no longer apply"
        )


def _listed(widths: Sequence[int]) -> str:
    return f"d_k {', '.join(map(str, widths))}"


def reduced_bytes(checkpoint: Checkpoint, widths: Sequence[int]) -> int:
    """Size of the reduced checkpoint's weights."""
    total = sum(file.stat().st_size for file in set(checkpoint.files.values()))
    ours = {name: m.ours for m in checkpoint.family.tensors(checkpoint.spec) for name in m.theirs}
    for name in checkpoint.family.key_rows(checkpoint.spec):
        layer = int(ours[name].split(".")[1])
        d_k = checkpoint.spec.d_k[layer]
        total -= checkpoint.tensor(name).nbytes * (d_k - widths[layer]) // d_k
    return total


def disk_line(needed: Sequence[tuple[str, int]], out: Path) -> str:
    """What will be written, and what is free where it goes.

    Raises:
        PruningError: there is less.
    """
    folder = next(p for p in (out.absolute(), *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(folder).free
    size = sum(size for _, size in needed)
    if size > free:
        raise PruningError(f"out={str(out)!r} needs {in_units(size)}, but {folder} has {in_units(free)} free")
    parts = " and ".join(f"{in_units(size)} for {what}" for what, size in needed)
    return f"disk: {parts}; {in_units(free)} free"
