"""What a command is going to do and what it takes, said before it does it.

Sizes are computed from shapes. Time is measured: one window through one layer of the checkpoint's shapes, on the device
that the real work runs on.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lowkey.files import check_writable
from lowkey.words import counted, duration, in_units
from modeling.checkpoint import FLOATS, Checkpoint
from modeling.model import Model
from modeling.spec import TOKEN_BLOCK, AttentionSpec, DeltaSpec, MixerSpec, ModelSpec
from pruning.calibration import BATCH
from pruning.capacity import parameter_count
from pruning.collection import Collector, zeros
from pruning.errors import PruningError
from pruning.gradients import add_gradients, need_gradients
from pruning.loaders import MODEL_TYPES, warnings
from pruning.statistics import StatisticName, shapes
from pruning.views import change, width

PROCESS_BYTES = 400 * 10**6
"""Bytes that a process holds without any model: Python, torch and the libraries that it loads."""


def statistics_bytes(spec: ModelSpec, names: Collection[StatisticName]) -> int:
    """Bytes of the statistics, in memory and as a file."""
    return 8 * sum(
        torch.Size(shape).numel() for layer in shapes(spec, names).values() for shape in layer.values()
    )


def activation_bytes(spec: ModelSpec, length: int, *, gradients: bool) -> int:
    """Upper bound of what one step holds beside weights and statistics: a batch forward, or one window with autograd.

    Counted in tensors of `modeling.layers` and `modeling.ops.chunked` that are alive together, in float32.
    """
    hidden = spec.hidden_size
    mixer = [3 * hidden + _mixer_activations(layer.mixer) for layer in spec.layers]
    ffn = [3 * hidden + 5 * layer.ffn.active_size for layer in spec.layers]
    forward = BATCH * length * max(*mixer, *ffn)
    if not gradients:
        return 4 * forward
    logits = 3 * length * spec.vocab_size
    weights = sum(sum(m.in_proj_sizes) for m in spec.deltas.values()) * hidden
    return 4 * max(forward, length * (sum(mixer) + sum(ffn)) + logits + weights)


def _mixer_activations(mixer: MixerSpec) -> int:
    """Numbers for each token that are alive together in a mixer, beside what goes in and comes out."""
    if isinstance(mixer, DeltaSpec):
        chunked = mixer.num_v_heads * (4 * TOKEN_BLOCK + 5 * (mixer.d_k + mixer.d_v))
        # The last term: float64 rows of the Grams, raw and normalised.
        return sum(mixer.in_proj_sizes) + 4 * mixer.conv_channels + chunked + 4 * 2 * mixer.key_dim
    if isinstance(mixer, AttentionSpec):
        # Keys and values are repeated for the heads of their group.
        return 2 * sum(mixer.in_proj_sizes) + 4 * mixer.q_dim
    return 0


def calibration_bytes(spec: ModelSpec, names: Collection[StatisticName], length: int) -> tuple[int, int, int]:
    """What calibration holds beside `PROCESS_BYTES`: weights in float32, activations, statistics."""
    active = activation_bytes(spec, length, gradients=need_gradients(names))
    return 4 * parameter_count(spec), active, statistics_bytes(spec, names)


def calibration_lines(spec: ModelSpec, names: Collection[StatisticName], windows: Tensor) -> Iterator[str]:
    """Passes and memory of collecting `names` on `windows` `[count, length]`."""
    count, length = windows.shape
    passes = "forward, then forward and backward" if need_gradients(names) else "forward"
    tokens = counted(windows.numel(), "token")
    yield f"calibration: {tokens}, {counted(count, 'window')} of {length}; {passes}"
    weights, active, held = calibration_bytes(spec, names, length)
    yield (
        f"memory: about {in_units(PROCESS_BYTES + weights + held + active)} (weights in float32 "
        f"{in_units(weights)}, activations {in_units(active)}, statistics {in_units(held)})"
    )


def time_line(parts: Sequence[tuple[str, float]], device: torch.device) -> str:
    """A line that says how long the work takes: each of its parts, (what, seconds), and their sum."""
    told = ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts)
    total = duration(sum(seconds for _, seconds in parts))
    of = f" ({told})" if len(parts) > 1 else ""
    return f"time: about {total} on {device}{of}, by one window through one layer"


def calibration_seconds(
    spec: ModelSpec, names: Collection[StatisticName], windows: Tensor, device: torch.device
) -> float:
    """Seconds that collecting `names` on `windows` `[count, length]` takes."""
    return len(windows) * window_seconds(spec, names, windows.shape[1], device)


def evaluation_seconds(spec: ModelSpec, tokens: int, window: int, device: torch.device) -> float:
    """Seconds that the perplexity of `tokens` takes, in windows of `window`."""
    one = window_seconds(spec, (), window, device) + _seconds(
        partial(_head, spec, window, device, gradients=False), device
    )
    return tokens / window * one


def training_seconds(
    student: ModelSpec, teacher: ModelSpec | None, windows: int, length: int, device: torch.device
) -> float:
    """Seconds that training on so many windows of `length` tokens takes, without what is measured in between."""
    one = _layers_seconds(student, length, device, _train) + _seconds(
        partial(_head, student, length, device), device
    )
    if teacher is not None:
        one += evaluation_seconds(teacher, length, length, device)
    return windows * one


def window_seconds(
    spec: ModelSpec, names: Collection[StatisticName], length: int, device: torch.device
) -> float:
    """Seconds that collecting `names` on one window takes; without any, a forward without its head."""
    total = _layers_seconds(spec, length, device, partial(_run, names))
    if need_gradients(names):
        total += _seconds(partial(_head, spec, length, device), device)
    return total


def _layers_seconds(
    spec: ModelSpec, length: int, device: torch.device, run: Callable[[Model, Tensor], None]
) -> float:
    """Seconds that `run` takes in all layers, from one of each kind, with made-up weights and a window."""
    total = 0.0
    for layer, count in Counter(spec.layers).items():
        one = replace(spec, layers=(layer,), vocab_size=8, eos_token_ids=())
        with device:
            model = Model(one)
            windows = torch.zeros(1, length, dtype=torch.long)
        model.eval().requires_grad_(False)
        for p in model.parameters():
            p.fill_(0.01)
        total += count * _seconds(partial(run, model, windows), device)
    return total


def _train(model: Model, windows: Tensor) -> None:
    model.requires_grad_()
    with torch.autocast(windows.device.type, torch.bfloat16):
        hidden, _ = model(windows.flatten(), [0, windows.numel()])
    hidden.float().sum().backward()


def _run(names: Collection[StatisticName], model: Model, windows: Tensor) -> None:
    layers = zeros(model.spec, names)
    with torch.no_grad():
        model(windows.flatten(), [0, windows.numel()], tap=Collector(layers).tap if names else None)
    if need_gradients(names) and layers:
        for _ in add_gradients(model, windows, layers):
            pass


def _head(spec: ModelSpec, length: int, device: torch.device, *, gradients: bool = True) -> None:
    weight = torch.zeros(spec.vocab_size, spec.hidden_size, device=device)
    hidden = torch.zeros(length, spec.hidden_size, device=device, requires_grad=gradients)
    targets = torch.zeros(length, dtype=torch.long, device=device)
    loss = F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")
    if gradients:
        loss.backward()


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    """How long the second of two runs takes: the first one pays for what is made only once."""
    for _ in range(2):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    return seconds


def shape_lines(spec: ModelSpec) -> Iterator[str]:
    """A line with the model's shapes and sizes."""
    m = next(iter(spec.deltas.values()))
    yield (
        f"{spec.family}: {counted(len(spec.layers), 'layer')}, hidden {spec.hidden_size}, "
        f"{counted(m.num_k_heads, 'key head')}, {counted(m.num_v_heads, 'value head')}, d_k {width(spec.d_k)}, "
        f"d_v {m.d_v}, {counted(parameter_count(spec), 'parameter')}, state per request {spec.state_bytes(0):,} bytes"
    )


def reduction_lines(spec: ModelSpec, widths: Sequence[int]) -> Iterator[str]:
    """Lines with the widths and the state before and after, and who no longer runs the new widths as the old ones."""
    before, after = spec.state_bytes(0), spec.with_d_k(tuple(widths)).state_bytes(0)
    yield (
        f"d_k {width(spec.d_k)} => {width(widths)}, "
        f"state per request {before:,} => {after:,} bytes ({change(before, after)})"
    )
    yield from width_notes(spec.d_k, widths)
    if spec.family in MODEL_TYPES:
        yield from warnings(spec.family, widths, next(iter(spec.deltas.values())).d_v)


def budget_line(passes: int, limit: int, windows: Tensor) -> str:
    """A line about what is measured to choose each layer's width."""
    return (
        f"widths: measured per layer for at most {counted(limit, 'byte')} of state, "
        f"{counted(passes, 'forward pass')} over {counted(windows.numel(), 'token')}"
    )


def width_notes(before: Sequence[int], after: Sequence[int]) -> Iterator[str]:
    """What kernels make of the new widths (docs/pruning.md, Widths). Which loaders run them is said by
    `pruning.loaders.warnings`."""
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


def _listed(widths: Sequence[int]) -> str:
    return f"d_k {', '.join(map(str, widths))}"


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint's weight files."""
    return sum(file.stat().st_size for file in set(checkpoint.files.values()))


def reduced_bytes(checkpoint: Checkpoint, widths: Sequence[int]) -> int:
    """Bytes of the reduced checkpoint's weight files."""
    total = stored_bytes(checkpoint)
    spec = checkpoint.spec
    after = dict(zip(spec.linear_layers, widths, strict=True))
    for name in checkpoint.key_rows:
        layer = checkpoint.map_of[name].layer
        assert layer is not None
        d_k = spec.deltas[layer].d_k
        dtype, shape = checkpoint.dtype_and_shape(name)
        total -= math.prod(shape) * FLOATS[dtype].itemsize * (d_k - after[layer]) // d_k
    return total


def disk_line(needed: Sequence[tuple[str, int]], out: Path, place: str | None = None) -> str:
    """What will be written, and what is free where it goes.

    Args:
        place: How a message names `out`; None for the argument of that name.

    Raises:
        PruningError: there is less.
        OutputError: nothing can be written there.
    """
    free = check_writable(out)
    size = sum(size for _, size in needed)
    if size > free:
        place = place or f"out={str(out)!r}"
        raise PruningError(f"{place} needs {in_units(size)}, but there is {in_units(free)} free")
    parts = " and ".join(f"{in_units(size)} for {what}" for what, size in needed)
    return f"disk: {parts}; {in_units(free)} free"
