"""Calibration statistics: per layer the float64 Grams of q and k and the second moments of the input, from one
streaming pass; gradients, from a second one, where a criterion reads them (`pruning.gradients`).

A Gram is the sum over tokens of outer products, `[d_k, d_k]` per key head. Everything kept is a sum: its size does not
depend on the number of tokens, and the statistics of two passes add up to those of both. The file is safetensors with
one JSON record in the metadata; it holds no code, so reading one from a stranger is safe.
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.layers import l2_normalise
from modeling.model import Model
from modeling.spec import ModelSpec
from pruning.calibration import Origin
from pruning.errors import PruningError
from pruning.gradients import GRADIENTS, GradientName, collect_gradients
from pruning.progress import Advance, no_progress

GramName = Literal["q", "k", "q_normalised", "k_normalised"]
"""Which rows: queries or keys of one head, after convolution and SiLU, before or after L2 normalisation."""

StatisticName = GramName | Literal["x_squares"] | GradientName
"""A Gram of each key head, `[num_k_heads, d_k, d_k]`; the sum of the squared channels of the layer's input, `[hidden]`;
or one of the gradient statistics."""

GRAMS: tuple[GramName, ...] = get_args(GramName)
FORWARD: tuple[StatisticName, ...] = (*GRAMS, "x_squares")
"""What every calibration collects."""
_FORMAT = 2


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of one checkpoint."""

    source_sha256: str
    """Hash of the checkpoint's config and weights (`Checkpoint.sha256`)."""
    origins: tuple[Origin, ...]
    """The passes that were added up."""
    layers: tuple[Mapping[StatisticName, Tensor], ...]
    """Per layer: float64 sums over tokens or windows, shaped as `StatisticName` says."""

    @property
    def names(self) -> tuple[StatisticName, ...]:
        """What was collected, in every layer alike."""
        return tuple(self.layers[0])

    @property
    def tokens(self) -> int:
        """Tokens that every layer saw."""
        return sum(origin.tokens for origin in self.origins)

    def check_source(self, checkpoint: Checkpoint) -> None:
        """Raises PruningError unless the statistics were taken from this checkpoint."""
        if self.source_sha256 != checkpoint.sha256:
            raise PruningError(
                f"the statistics were taken from a checkpoint with sha256 {self.source_sha256[:12]}..., "
                f"but {checkpoint.source} has {checkpoint.sha256[:12]}...; calibrate it again"
            )


class Collector:
    """Accumulates the `FORWARD` statistics through the model's tap. Use `collect`, unless you drive the model."""

    def __init__(self, spec: ModelSpec) -> None:
        mixers = [layer.mixer for layer in spec.layers]
        self.tokens = [0] * len(mixers)
        self.layers: list[dict[StatisticName, Tensor]] = [
            {
                **{name: torch.zeros(m.num_k_heads, m.d_k, m.d_k, dtype=torch.float64) for name in GRAMS},
                "x_squares": torch.zeros(spec.hidden_size, dtype=torch.float64),
            }
            for m in mixers
        ]

    def tap(self, layer: int, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """A `modeling.layers.Tap`: adds x `[tokens, hidden]`, q and k `[tokens, num_k_heads, d_k]` of one layer, and
        changes nothing.

        Raises:
            PruningError: x, q or k is not finite.
        """
        raw_q, raw_k = q.detach().double(), k.detach().double()
        rows: dict[GramName, Tensor] = {
            "q": raw_q,
            "k": raw_k,
            "q_normalised": l2_normalise(raw_q),
            "k_normalised": l2_normalise(raw_k),
        }
        squares = x.detach().double().square()
        self._check_finite(layer, "x", squares)
        self.layers[layer]["x_squares"] += squares.sum(0).cpu()
        for name, r in rows.items():
            self._check_finite(layer, name, r)
            heads = r.transpose(0, 1)
            self.layers[layer][name] += (heads.transpose(1, 2) @ heads).cpu()
        self.tokens[layer] += q.shape[0]
        return q, k

    def _check_finite(self, layer: int, name: str, values: Tensor) -> None:
        if not bool(values.isfinite().all()):
            raise PruningError(
                f"layer {layer}: {name} holds NaN or Inf after {self.tokens[layer]} tokens; "
                "the checkpoint or its dtype is broken, and no selection from this would mean anything"
            )

    def check_tokens(self, fed: int) -> None:
        """Raises PruningError unless every layer saw exactly the tokens that were fed to the model."""
        for layer, seen in enumerate(self.tokens):
            if seen != fed:
                raise PruningError(
                    f"layer {layer}: the tap saw {seen} of {fed} tokens; its statistics would be wrong"
                )


def collect(
    model: Model,
    windows: Tensor,
    origin: Origin,
    source_sha256: str,
    *,
    needed: Collection[StatisticName] = (),
    batch: int = 4,
    advance: Advance = no_progress,
) -> Statistics:
    """Run `windows` int64 `[count, length]` through the model, `batch` at a time, and keep the `FORWARD` statistics.

    Args:
        needed: what criteria read. Gradient statistics in it take a second pass, which goes forward and backward.

    Raises:
        PruningError: an activation or a gradient is not finite, or a layer's tap missed tokens.
    """
    collector = Collector(model.spec)
    length = windows.shape[1]
    device = model.embeddings.weight.device
    with torch.no_grad():
        for rows in windows.split(batch):
            cu_seqlens = range(0, rows.numel() + 1, length)
            model(rows.flatten().to(device), cu_seqlens, tap=collector.tap)
            advance(rows.numel())
    collector.check_tokens(windows.numel())
    gradients = [name for name in GRADIENTS if name in needed]
    if gradients:
        for layer, found in zip(
            collector.layers, collect_gradients(model, windows, gradients, advance=advance), strict=True
        ):
            for name, total in found.items():
                layer[name] = total
    return Statistics(source_sha256, (origin,), tuple(collector.layers))


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
        for origin in part.origins:
            if origin in origins:
                raise PruningError(
                    f"the same pass is there twice ({origin.as_json()}); draw with another seed"
                )
            origins.append(origin)
    layers = [
        {name: torch.stack([part.layers[i][name] for part in parts]).sum(0) for name in first.names}
        for i in range(len(first.layers))
    ]
    return Statistics(first.source_sha256, tuple(origins), tuple(layers))


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write one safetensors file, through a temporary name."""
    record = {
        "format": _FORMAT,
        "source_sha256": statistics.source_sha256,
        "names": statistics.names,
        "origins": [origin.as_json() for origin in statistics.origins],
    }
    tensors = {
        f"layers.{i}.{name}": values
        for i, layer in enumerate(statistics.layers)
        for name, values in layer.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"lowkey_statistics": json.dumps(record)})
        temporary.chmod(0o644)  # safetensors leaves it readable by its owner only
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_statistics(path: Path) -> Statistics:
    """Read what `save_statistics` wrote. Raises PruningError if the file is missing or something else."""
    try:
        with safe_open(path, framework="pt") as f:
            record: dict[str, Any] = json.loads((f.metadata() or {})["lowkey_statistics"])
            if record["format"] != _FORMAT:
                raise PruningError(f"{path} has format {record['format']}; this version reads {_FORMAT}")
            names: list[StatisticName] = record["names"]
            count = len(list(f.keys())) // len(names)
            layers = tuple({name: f.get_tensor(f"layers.{i}.{name}") for name in names} for i in range(count))
            origins = tuple(
                Origin(**{key: value for key, value in origin.items() if key != "tokens"})
                for origin in record["origins"]
            )
            return Statistics(record["source_sha256"], origins, layers)
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise PruningError(
            f"{path} is not a statistics file of lowkey-prune ({type(e).__name__}: {e})"
        ) from e
