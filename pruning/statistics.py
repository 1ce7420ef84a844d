"""Calibration statistics: what one text says about the key channels of one checkpoint, as sums over its tokens.

Per layer the float64 Grams and sums of q and k and the second moments of the input, and gradients where a criterion
reads them. Everything kept is a sum: its size does not depend on the number of tokens, and the statistics of two passes
add up to those of both. The file is safetensors with one JSON record in the metadata; it holds no code, so reading
one from a stranger is safe. `pruning.collection` collects them.
"""

import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowkey.files import Found
from lowkey.publishing import new_file, replacing
from lowkey.words import counted
from modeling.checkpoint import Checkpoint
from modeling.spec import ModelSpec
from pruning.calibration import Origin
from pruning.errors import PruningError
from pruning.gradients import GRADIENTS, GradientName

GramName = Literal["q", "k", "q_normalised", "k_normalised"]
"""Which rows: queries or keys of one head, after convolution and SiLU, before or after L2 normalisation."""

SumName = Literal["q_sum", "k_sum", "q_normalised_sum", "k_normalised_sum"]
"""The same rows, summed; over `Statistics.tokens` they are the means."""

StatisticName = GramName | SumName | Literal["x_squares"] | GradientName
"""A Gram of each key head, `[num_k_heads, d_k, d_k]`, or a sum of its rows, `[num_k_heads, d_k]`; the sum of the
squared channels of the layer's input, `[hidden]`; or one of the gradient statistics."""

GRAMS: tuple[GramName, ...] = get_args(GramName)
SUMS: tuple[SumName, ...] = get_args(SumName)
FORWARD: tuple[StatisticName, ...] = (*GRAMS, *SUMS, "x_squares")
"""What every calibration collects."""
_FORMAT = 3
_HIDDEN = "hidden"
"""The tensor of an unfinished calibration's file that holds hidden states, beside those of statistics."""


def names_for(needed: Collection[StatisticName]) -> tuple[StatisticName, ...]:
    """What a calibration collects for criteria that read `needed`: `FORWARD`, and the gradients in it."""
    return (*FORWARD, *(name for name in GRADIENTS if name in needed))


Shapes = dict[int, dict[StatisticName, tuple[int, ...]]]
"""Shapes of statistics by the index of their layer and their name."""


def shapes(spec: ModelSpec, names: Collection[StatisticName]) -> Shapes:
    """The shape of each statistic of each linear-attention layer; all are float64."""
    return {
        layer: _shapes_of_layer(m.num_k_heads, m.d_k, spec.hidden_size, names)
        for layer, m in spec.deltas.items()
    }


def _shapes_of_layer(
    heads: int, d_k: int, hidden: int, names: Collection[StatisticName]
) -> dict[StatisticName, tuple[int, ...]]:
    known: dict[StatisticName, tuple[int, ...]] = {
        **dict.fromkeys(GRAMS, (heads, d_k, d_k)),
        **dict.fromkeys(SUMS, (heads, d_k)),
        "x_squares": (hidden,),
        "q_gradient": (heads, d_k, hidden),
        "k_gradient": (heads, d_k, hidden),
        "gate_fisher": (heads, d_k),
    }
    return {name: known[name] for name in names}


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of one checkpoint."""

    source_sha256: str
    """Hash of the checkpoint's config and weights (`Checkpoint.sha256`)."""
    origins: tuple[Origin, ...]
    """The passes that were added up."""
    layers: Mapping[int, Mapping[StatisticName, Tensor]]
    """Float64 sums over tokens or windows, shaped as `StatisticName` says, by the index of each linear-attention layer
    in the model."""

    @property
    def names(self) -> tuple[StatisticName, ...]:
        """What was collected, in every layer alike."""
        return tuple(next(iter(self.layers.values())))

    @property
    def shapes(self) -> Shapes:
        """The shape of each statistic of each layer."""
        return {
            i: {name: tuple(values.shape) for name, values in layer.items()}
            for i, layer in self.layers.items()
        }

    @property
    def tokens(self) -> int:
        """Tokens that every layer saw."""
        return sum(origin.tokens for origin in self.origins)

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Raises PruningError unless the statistics were taken from this checkpoint and are whole."""
        if self.source_sha256 != checkpoint.sha256:
            raise PruningError(
                f"the statistics were taken from a checkpoint with sha256 {self.source_sha256[:12]}..., "
                f"but {checkpoint.source} has {checkpoint.sha256[:12]}...; calibrate it again"
            )
        expected = shapes(checkpoint.spec, self.names)
        if self.layers.keys() != expected.keys():
            raise PruningError(
                f"the statistics are of {counted(len(self.layers), 'layer')}, not of {len(expected)}"
                if len(self.layers) != len(expected)
                else f"the statistics are of layers {[*self.layers]}, not of {[*expected]}"
            )
        for i, of_layer in expected.items():
            for name, shape in of_layer.items():
                found = self.layers[i][name]
                if found.shape != shape or found.dtype != torch.float64 or not bool(found.isfinite().all()):
                    raise PruningError(
                        f"layer {i} of the statistics: {name} is {found.dtype} {list(found.shape)}; it must be finite "
                        f"float64 {list(shape)}: calibrate again"
                    )


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Add up passes over the same checkpoint.

    Raises:
        PruningError: there is nothing to add, the checkpoints or what was collected differ, or one pass is there twice.
    """
    if not parts:
        raise PruningError("there are no statistics to merge")
    first = parts[0]
    origins: list[Origin] = []
    for part in parts:
        if part.source_sha256 != first.source_sha256:
            raise PruningError(
                f"statistics of different checkpoints can't be merged: sha256 {first.source_sha256[:12]}... "
                f"and {part.source_sha256[:12]}..."
            )
        if set(part.names) != set(first.names):
            raise PruningError(
                "the parts hold different statistics: "
                f"{', '.join(sorted(set(part.names) ^ set(first.names)))} is not in all of them; "
                "calibrate them for the same methods"
            )
        if part.shapes != first.shapes:
            raise PruningError(
                "the parts are of other layers or widths, though of one checkpoint: calibrate again"
            )
        for origin in part.origins:
            if any(_same_tokens(origin, o) for o in origins):
                raise PruningError(
                    f"the same tokens are there twice ({origin.as_json()}); draw with another seed, or take other "
                    "shards of one draw"
                )
            origins.append(origin)
    layers = {
        i: {name: torch.stack([part.layers[i][name] for part in parts]).sum(0) for name in first.names}
        for i in first.layers
    }
    return Statistics(first.source_sha256, tuple(origins), layers)


def _same_tokens(a: Origin, b: Origin) -> bool:
    """Whether two passes have tokens in common: one draw begins like a longer one of the same text and seed, and only
    the shards of one draw, into one number of parts, are apart."""
    if a.tokens_sha256 == b.tokens_sha256:
        return True
    if (a.text_sha256, a.seed, a.window_length) != (b.text_sha256, b.seed, b.window_length):
        return False
    parts = [origin.shard and origin.shard.split("/")[1] for origin in (a, b)]
    return None in parts or parts[0] != parts[1]


def save_statistics(
    statistics: Statistics,
    path: Path,
    *,
    replaces: Found | None = None,
    unfinished: Mapping[str, int] | None = None,
    hidden: Tensor | None = None,
) -> None:
    """Write one safetensors file, through a temporary name.

    Args:
        replaces: what the file may replace, as `check_new_file` found it.
        unfinished: how far a calibration that is still running has come; only `load_unfinished` reads such a file, and
            it replaces whatever is there.
        hidden: the hidden states that one which runs layer by layer goes on from; `load_hidden` reads them.

    Raises:
        OutputTakenError: something else is there; the statistics are beside it.
        OutputError: it can't be written.
    """
    record = {
        "format": _FORMAT,
        "source_sha256": statistics.source_sha256,
        "names": statistics.names,
        "origins": [origin.as_json() for origin in statistics.origins],
        "unfinished": None if unfinished is None else dict(unfinished),
    }
    tensors = {
        f"layers.{i}.{name}": values
        for i, layer in statistics.layers.items()
        for name, values in layer.items()
    }
    if hidden is not None:
        tensors[_HIDDEN] = hidden
    written = new_file(path, replaces=replaces) if unfinished is None else replacing(path)
    with written as temporary:
        save_file(tensors, temporary, metadata={"lowkey_statistics": json.dumps(record)})
        temporary.chmod(0o644)  # safetensors leaves it readable by its owner only


def load_statistics(path: Path) -> Statistics:
    """Read what `save_statistics` wrote. Raises PruningError if the file is missing, unfinished or something else."""
    statistics, unfinished = _load(path)
    if unfinished is not None:
        raise PruningError(f"{path} is of a calibration that has not ended; start it again and it goes on")
    return statistics


def load_unfinished(path: Path) -> tuple[Statistics, dict[str, int]]:
    """Read what an interrupted calibration left. Raises PruningError if it is something else."""
    statistics, unfinished = _load(path)
    if unfinished is None:
        raise PruningError(
            f"{path} is a finished statistics file, not what an interrupted calibration leaves"
        )
    return statistics, unfinished


def load_hidden(path: Path, shape: tuple[int, int]) -> Tensor:
    """The hidden states in a file that `load_unfinished` has read: float32 of `shape`, `(tokens, hidden)`.

    Raises:
        PruningError: it holds none, or others.
    """
    try:
        with safe_open(path, framework="pt") as f:
            hidden: Tensor = f.get_tensor(_HIDDEN)
    except (OSError, SafetensorError) as e:
        raise PruningError(f"{path} holds no hidden states to go on from: {e}") from e
    if hidden.shape != shape or hidden.dtype != torch.float32:
        raise PruningError(
            f"{path} holds hidden states of {hidden.dtype} {list(hidden.shape)}, not torch.float32 {list(shape)}: "
            "it is damaged; remove it to start anew"
        )
    return hidden


def _load(path: Path) -> tuple[Statistics, dict[str, int] | None]:
    if os.path.isdir(path):  # safetensors would say that there is no such device
        raise PruningError(f"{path} is a directory, not a statistics file of lowkey-prune")
    try:
        with safe_open(path, framework="pt") as f:
            record: dict[str, Any] = json.loads((f.metadata() or {})["lowkey_statistics"])
            if record["format"] != _FORMAT:
                raise PruningError(
                    f"{path} has format {record['format']}; this version reads {_FORMAT}: calibrate again"
                )
            names: list[StatisticName] = record["names"]
            if not names or not {*names} <= {*FORWARD, *GRADIENTS}:
                raise PruningError(f"{path} holds statistics called {names}; known: {[*FORWARD, *GRADIENTS]}")
            indices = sorted(
                {int(tensor.split(".")[1]) for tensor in f.keys() if tensor != _HIDDEN}  # noqa: SIM118
            )
            layers = {i: {name: f.get_tensor(f"layers.{i}.{name}") for name in names} for i in indices}
            _check_layers(layers)
            origins = tuple(
                Origin(**{key: value for key, value in origin.items() if key != "tokens"})
                for origin in record["origins"]
            )
            statistics = Statistics(record["source_sha256"], origins, layers)
            if record["unfinished"] is not None:
                _check_done(record["unfinished"], statistics)
            return statistics, record["unfinished"]
    except (
        OSError,
        SafetensorError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as e:
        if isinstance(e, PruningError):
            raise
        raise PruningError(
            f"{path} is not a statistics file of lowkey-prune ({type(e).__name__}: {e})"
        ) from e


def _check_done(done: Any, statistics: Statistics) -> None:
    """Raises ValueError unless `done` says how far a calibration of these statistics can have come."""
    windows = sum(origin.windows for origin in statistics.origins)
    highest = {"forward": windows, "backward": windows, "batch": math.inf}
    if "layer" in done:
        highest = {"forward": windows, "layer": max(statistics.layers) + 1, "batch": math.inf}
    if done.keys() != highest.keys():
        raise ValueError(f"unfinished has the keys {sorted(done)}, not {sorted(highest)}")
    for key, most in highest.items():
        least = 1 if key == "batch" else 0
        if type(done[key]) is not int or not least <= done[key] <= most:
            raise ValueError(f"unfinished: {key}={done[key]!r} must be a whole number from {least} to {most}")
    # Whole batches are done, of which the last one may be smaller.
    if done["forward"] % done["batch"] and done["forward"] != windows:
        raise ValueError(f"unfinished: forward={done['forward']} is not whole batches of {done['batch']}")


def _check_layers(layers: Mapping[int, Mapping[StatisticName, Tensor]]) -> None:
    """Raises ValueError unless there are layers, each of float64 tensors whose shapes fit each other."""
    if not layers:
        raise ValueError("it has no layers")
    for i, layer in layers.items():
        heads, d_k = layer["k_sum"].shape
        (hidden,) = layer["x_squares"].shape
        for name, shape in _shapes_of_layer(heads, d_k, hidden, tuple(layer)).items():
            if layer[name].shape != shape or layer[name].dtype != torch.float64:
                raise ValueError(
                    f"layer {i}: {name} is {layer[name].dtype} {list(layer[name].shape)}, not float64 {list(shape)}"
                )
