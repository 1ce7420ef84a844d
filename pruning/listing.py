"""What the terminal shows of a checkpoint's layers and tensors, however many there are: what is alike shares a line."""

import re
from collections.abc import Iterator, Mapping, Sequence

from rich.text import Text
from rich.tree import Tree

from lowkey.words import counted
from modeling.checkpoint import Checkpoint
from modeling.spec import FLOAT32_STATES, ModelSpec
from pruning.record import record_of
from pruning.views import arrow

_RUNS = 4
"""Runs of numbers that are written out, at most."""
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


def add_layers(root: Tree, checkpoint: Checkpoint) -> None:
    """Add to a checkpoint's `tree` the state of each linear-attention layer and every tensor; before => after where it
    is reduced.

    Layers that are alike share their lines, and so do the experts of a layer.

    Raises:
        PruningError: `state_reduction.json` is of another format or broken.
        CheckpointError: the weights can't be read.
    """
    after = checkpoint.spec
    record = record_of(checkpoint)
    before = after if record is None else after.with_d_k(tuple(record["source"]["d_k"]))
    states = root.add("state per request and layer")
    lines = {
        layer: [
            Text.assemble(
                *("d_k ", *arrow(str(before.deltas[layer].d_k), str(m.d_k)), ", "),
                *(*arrow(f"{_state_bytes(before, layer):,}", f"{_state_bytes(after, layer):,}"), " bytes"),
            )
        ]
        for layer, m in after.deltas.items()
    }
    for label, (line,) in _alike(lines):
        states.add(Text.assemble(f"{label}: ", line))
    tensors = root.add("tensors")
    for name in (name for m in checkpoint.maps if m.layer is None for name in m.theirs):
        dtype, shape = checkpoint.dtype_and_shape(name)
        tensors.add(f"{name} {dtype} {shape}")
    for label, of_layer in _alike(_layer_lines(checkpoint, before)):
        branch = tensors.add(label)
        for line in of_layer:
            branch.add(line)
    for prefix in checkpoint.family.ignored:
        count = sum(name.startswith(prefix) for name in checkpoint.files)
        if count:
            tensors.add(f"{prefix}*: {counted(count, 'tensor')}, which are copied as they are")


def _state_bytes(spec: ModelSpec, layer: int) -> int:
    return spec.layers[layer].mixer.state_bytes(0, FLOAT32_STATES)


def _layer_lines(checkpoint: Checkpoint, before: ModelSpec) -> dict[int, list[Text]]:
    """The lines of each layer's tensors, by its index."""
    widths = {layer: mixer.d_k for layer, mixer in before.deltas.items()}
    # The experts, if any, of tensors that are alike: their name within the layer, dtype, and shape before and after.
    by_layer: dict[int, dict[tuple[str, str, str, str], list[int]]] = {
        i: {} for i in range(len(checkpoint.spec.layers))
    }
    for m in checkpoint.maps:
        if m.layer is None:
            continue
        for name in m.theirs:
            dtype, shape = checkpoint.dtype_and_shape(name)
            was = checkpoint.shape_with_d_k(name, widths)
            # Layers that are alike have names that differ in the layer's index alone.
            inside = name.partition(f".{m.layer}.")[2] or name
            expert = _EXPERT.search(inside)
            if expert is not None:
                inside = f"{inside[: expert.start(1)]}{{}}{inside[expert.end(1) :]}"
            experts = by_layer[m.layer].setdefault((inside, dtype, str(was), str(shape)), [])
            experts += [] if expert is None else [int(expert[1])]
    return {
        layer: [
            Text.assemble(f"{_with_experts(inside, experts)} {dtype} ", *arrow(was, shape))
            for (inside, dtype, was, shape), experts in lines.items()
        ]
        for layer, lines in by_layer.items()
    }


def _with_experts(inside: str, experts: Sequence[int]) -> str:
    """A tensor's name with the numbers of all experts that have such a one: `experts.{0 to 255}.up_proj.weight`."""
    if not experts:
        return inside
    numbers = ", ".join(_runs(sorted(experts)))
    return inside.replace("{}", numbers if len(experts) == 1 else f"{{{numbers}}}", 1)


def _alike(lines: Mapping[int, list[Text]]) -> Iterator[tuple[str, list[Text]]]:
    """(which layers, their common lines) for all layers of the same lines, in the order of their first ones."""
    groups: list[tuple[list[Text], list[int]]] = []
    for layer, own in lines.items():
        same = next((layers for common, layers in groups if common == own), None)
        if same is None:
            groups.append((own, [layer]))
        else:
            same.append(layer)
    for common, layers in groups:
        numbers = ", ".join(_runs(layers))
        yield f"layers {numbers}, each" if len(layers) > 1 else f"layer {numbers}", common


def _runs(numbers: Sequence[int]) -> list[str]:
    """Ascending numbers as `0 to 2`, `4` and the like; of many such runs the first two and the last."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    said = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    return said if len(said) <= _RUNS else [*said[:2], "...", said[-1]]
