"""What a command is going to do and what it takes, said before it does it.

Sizes are computed from shapes. Time is measured: one window through one layer of the checkpoint's shapes, on the device
that the real work runs on.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from lowkey.files import check_writable
from lowkey.words import counted, duration, in_units
from modeling.checkpoint import FLOATS, Checkpoint
from modeling.layers import MoE
from modeling.model import Model
from modeling.spec import LayerSpec, MLPSpec, ModelSpec, MoESpec
from pruning.calibration import BATCH
from pruning.capacity import parameter_count
from pruning.collection import Collector, zeros
from pruning.errors import DoesNotFitError
from pruning.fused import training_rule
from pruning.gradients import add_gradients, need_gradients
from pruning.memory import Memory, config_dtype
from pruning.reconstruction import products
from pruning.statistics import StatisticName
from pruning.streaming import layers_to_run
from pruning.views import change, width


def calibration_lines(names: Collection[StatisticName], windows: Tensor, memory: Memory) -> Iterator[str]:
    """Passes and memory of collecting `names` on `windows` `[count, length]`."""
    count, length = windows.shape
    passes = "forward, then forward and backward" if need_gradients(names) else "forward"
    if memory.hidden:
        passes += ", one layer at a time"
    tokens = counted(windows.numel(), "token")
    yield f"calibration: {tokens}, {counted(count, 'window')} of {length}; {passes}"
    weights = f"weights in float32 {in_units(memory.weights)}"
    if memory.hidden:
        weights = f"the largest layer {in_units(memory.weights)}, hidden states {in_units(memory.hidden)}"
    yield (
        f"memory: about {in_units(memory.total)} ({weights}, activations {in_units(memory.activations)}, "
        f"statistics {in_units(memory.statistics)})"
    )


def training_line(memory: Memory) -> str:
    """The memory of a recovery."""
    return (
        f"memory: about {in_units(memory.total)} (weights in float32 {in_units(memory.weights)}, gradients and moments "
        f"{in_units(memory.training)}, activations {in_units(memory.activations)})"
    )


def time_line(parts: Sequence[tuple[str, float]], device: torch.device) -> str:
    """A line that says how long the work takes: each of its parts, (what, seconds), and their sum."""
    told = ", ".join(f"{what} {duration(seconds)}" for what, seconds in parts)
    total = duration(sum(seconds for _, seconds in parts))
    of = f" ({told})" if len(parts) > 1 else ""
    return f"time: about {total} on {device}{of}, by one window through one layer"


def calibration_seconds(
    spec: ModelSpec,
    names: Collection[StatisticName],
    windows: Tensor,
    device: torch.device,
    experts: torch.dtype = torch.float32,
) -> float:
    """Seconds that collecting `names` on `windows` `[count, length]` takes, with experts held in such a dtype."""
    count, length = windows.shape
    one = _layers_seconds(
        spec, length, device, partial(_run, names), together=min(count, BATCH), experts=experts
    )
    if need_gradients(names):
        one += _seconds(partial(_head, spec, length, device), device)
    return count * one


def evaluation_seconds(spec: ModelSpec, tokens: int, window: int, device: torch.device) -> float:
    """Seconds that the perplexity of `tokens` takes, in windows of `window`."""
    one = _layers_seconds(spec, window, device, partial(_run, ())) + _seconds(
        partial(_head, spec, window, device, gradients=False), device
    )
    return tokens / window * one


def training_seconds(
    student: ModelSpec, teacher: ModelSpec | None, windows: int, length: int, device: torch.device
) -> float:
    """Seconds that training on so many windows of `length` tokens takes, without what is measured in between."""
    one = _layers_seconds(student, length, device, partial(_train, torch.bfloat16))
    one += _seconds(partial(_head, student, length, device), device)
    if teacher is not None:
        one += _layers_seconds(teacher, length, device, partial(_teach, torch.bfloat16))
        one += _seconds(partial(_head, teacher, length, device, gradients=False), device)
    return windows * one


def reconstruction_seconds(
    spec: ModelSpec, passes: float, fitted: int, length: int, device: torch.device
) -> float:
    """Seconds that reconstruction takes: `passes` of windows of `length` tokens forward through all layers that it
    runs, and `fitted` of them forward and backward through each layer with linear attention."""
    dtype = products(device)
    run = replace(spec, layers=spec.layers[: layers_to_run(spec)])
    trained = replace(spec, layers=tuple(spec.layers[i] for i in spec.linear_layers))
    forward = _layers_seconds(run, length, device, partial(_teach, dtype))
    return passes * forward + fitted * _layers_seconds(trained, length, device, partial(_train, dtype))


def _layers_seconds(
    spec: ModelSpec,
    length: int,
    device: torch.device,
    run: Callable[[Model, Tensor], None],
    *,
    together: int = 1,
    experts: torch.dtype = torch.float32,
) -> float:
    """Seconds that `run` takes in all layers, from one of each kind, with made-up weights and a window.

    Args:
        together: Windows that really run together, so that experts get more tokens at a time.
        experts: The dtype that experts are held in.
    """

    def seconds(layer: LayerSpec) -> float:
        model = _made_up(spec, layer, length, experts).to(device)
        return _seconds(partial(run, model, torch.arange(length, device=device)[None]), device)

    total = 0.0
    for layer, count in Counter(spec.layers).items():
        ffn = layer.ffn
        if isinstance(ffn, MoESpec):
            # All experts of a layer can be more than fits in memory. Of so many fewer that each gets as many tokens
            # as it really does, a window takes one for each of its tokens, and its work is that of one of `top_k`.
            few = MoESpec(
                max(1, ffn.num_experts // (ffn.top_k * together)), 1, ffn.expert_size, ffn.shared_size
            )
            without = seconds(replace(layer, ffn=MLPSpec(ffn.shared_size)))
            routed = max(0.0, seconds(replace(layer, ffn=few)) - without)
            total += count * (without + ffn.top_k * routed)
        else:
            total += count * seconds(layer)
    return total


def _made_up(spec: ModelSpec, layer: LayerSpec, length: int, experts: torch.dtype) -> Model:
    """A model of one layer and a vocabulary of `length` tokens, that goes to all experts alike."""
    model = Model(replace(spec, layers=(layer,), vocab_size=length, eos_token_ids=()))
    generator = torch.Generator().manual_seed(0)
    for name, p in model.eval().requires_grad_(False).named_parameters():
        if name in ("embeddings.weight", "layers.0.ffn.router.weight"):
            p.normal_(generator=generator)
        else:
            p.fill_(0.01)
    ffn = model.blocks[0].ffn
    if isinstance(ffn, MoE):
        ffn.in_proj.data, ffn.out_proj.data = ffn.in_proj.to(experts), ffn.out_proj.to(experts)
    return model


def _train(dtype: torch.dtype, model: Model, windows: Tensor) -> None:
    """A window forward and backward with products in a dtype, by the rule that training takes there."""
    model.requires_grad_()
    _forward(dtype, model, windows).float().sum().backward()


def _teach(dtype: torch.dtype, model: Model, windows: Tensor) -> None:
    """The same forward only."""
    with torch.no_grad():
        _forward(dtype, model, windows)


def _forward(dtype: torch.dtype, model: Model, windows: Tensor) -> Tensor:
    device = windows.device
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden: Tensor = model(windows.flatten(), [0, windows.numel()], rule=training_rule(device))[0]
    return hidden


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
    """Lines with the widths and the state before and after, and what kernels make of the new widths."""
    before, after = spec.state_bytes(0), spec.with_d_k(tuple(widths)).state_bytes(0)
    yield (
        f"d_k {width(spec.d_k)} => {width(widths)}, "
        f"state per request {before:,} => {after:,} bytes ({change(before, after)})"
    )
    yield from width_notes(spec.d_k, widths)


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


def largest_file_bytes(checkpoint: Checkpoint) -> int:
    """Bytes of the largest of the checkpoint's weight files; of all, where there are none yet."""
    if not checkpoint.has_weights:
        return reduced_bytes(checkpoint, checkpoint.spec.d_k)
    return max(file.stat().st_size for file in set(checkpoint.files.values()))


def reduced_bytes(checkpoint: Checkpoint, widths: Sequence[int]) -> int:
    """Bytes of the reduced checkpoint's weight files."""
    spec = checkpoint.spec
    if not checkpoint.has_weights:
        return config_dtype(checkpoint.config).itemsize * parameter_count(spec.with_d_k(tuple(widths)))
    total = stored_bytes(checkpoint)
    after = dict(zip(spec.linear_layers, widths, strict=True))
    for name in checkpoint.key_rows:
        dtype, shape = checkpoint.dtype_and_shape(name)
        removed = math.prod(shape) - math.prod(checkpoint.shape_with_d_k(name, after))
        total -= removed * FLOATS[dtype].itemsize
    return total


def disk_lines(
    needed: Sequence[tuple[str, int]], out: Path, place: str | None = None, *, dry_run: bool = False
) -> Iterator[str]:
    """A line with what will be written, and what is free where it goes.

    Args:
        place: How a message names `out`; None for the argument of that name.
        dry_run: say in another line that there is less.

    Raises:
        DoesNotFitError: there is less, and it is no dry run.
        OutputError: nothing can be written there.
    """
    free = check_writable(out)
    parts = " and ".join(f"{in_units(size)} for {what}" for what, size in needed)
    yield f"disk: {parts}; {in_units(free)} free"
    size = sum(size for _, size in needed)
    place = place or f"out={str(out)!r}"
    misfits: list[str] = []
    with noted(misfits, dry_run=dry_run):
        if size > free:
            raise DoesNotFitError(f"{place} needs {in_units(size)}, but there is {in_units(free)} free")
    yield from misfits


@contextmanager
def noted(misfits: list[str], *, dry_run: bool) -> Iterator[None]:
    """In a dry run makes a line of `misfits` out of the block's DoesNotFitError: what the work takes is to be said also
    where it can't be done."""
    try:
        yield
    except DoesNotFitError as e:
        if not dry_run:
            raise
        misfits.append(f"note: {e}")
