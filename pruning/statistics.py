"""Calibration statistics: per layer and key head the float64 Grams of q and k, from one streaming pass.

A Gram is the sum over tokens of outer products, `[d_k, d_k]`: its size does not depend on the number of tokens, and the
Grams of two passes add up to those of both. The file is safetensors with one JSON record in the metadata; it holds
no code, so reading one from a stranger is safe.
"""

import json
import os
from collections.abc import Mapping, Sequence
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
from pruning.progress import Advance, no_progress

GramName = Literal["q", "k", "q_normalised", "k_normalised"]
"""Which rows: queries or keys of one head, after convolution and SiLU, before or after L2 normalisation."""

GRAMS: tuple[GramName, ...] = get_args(GramName)
_FORMAT = 1


@dataclass(frozen=True)
class Statistics:
    """What calibration saw of one checkpoint."""

    source_sha256: str
    """Hash of the checkpoint's config and weights (`Checkpoint.sha256`)."""
    origins: tuple[Origin, ...]
    """The passes that were added up."""
    layers: tuple[Mapping[GramName, Tensor], ...]
    """Per layer: float64 `[num_k_heads, d_k, d_k]`, summed over tokens."""

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
    """Accumulates Grams through the model's tap. Use `collect` unless you drive the model yourself."""

    def __init__(self, spec: ModelSpec) -> None:
        mixers = [layer.mixer for layer in spec.layers]
        self.tokens = [0] * len(mixers)
        self.layers: list[dict[GramName, Tensor]] = [
            {name: torch.zeros(m.num_k_heads, m.d_k, m.d_k, dtype=torch.float64) for name in GRAMS}
            for m in mixers
        ]

    def tap(self, layer: int, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """A `modeling.layers.Tap`: adds q and k `[tokens, num_k_heads, d_k]` of one layer, changes nothing.

        Raises:
            PruningError: q or k is not finite.
        """
        raw_q, raw_k = q.detach().double(), k.detach().double()
        rows: dict[GramName, Tensor] = {
            "q": raw_q,
            "k": raw_k,
            "q_normalised": l2_normalise(raw_q),
            "k_normalised": l2_normalise(raw_k),
        }
        for name, r in rows.items():
            if not bool(r.isfinite().all()):
                raise PruningError(
                    f"layer {layer}: {name} holds NaN or Inf after {self.tokens[layer]} tokens; "
                    "the checkpoint or its dtype is broken, and no selection from this would mean anything"
                )
            heads = r.transpose(0, 1)
            self.layers[layer][name] += (heads.transpose(1, 2) @ heads).to(self.layers[layer][name].device)
        self.tokens[layer] += q.shape[0]
        return q, k

    def check_tokens(self, fed: int) -> None:
        """Raises PruningError unless every layer saw exactly the tokens that were fed to the model."""
        for layer, seen in enumerate(self.tokens):
            if seen != fed:
                raise PruningError(
                    f"layer {layer}: the tap saw {seen} of {fed} tokens; its statistics would be wrong"
                )


@torch.no_grad()
def collect(
    model: Model,
    windows: Tensor,
    origin: Origin,
    source_sha256: str,
    *,
    batch: int = 4,
    advance: Advance = no_progress,
) -> Statistics:
    """Run `windows` int64 `[count, length]` through the model, `batch` at a time, and keep the Grams.

    Raises:
        PruningError: q or k is not finite, a layer's tap missed tokens, or a token is in none of the windows.
    """
    collector = Collector(model.spec)
    length = windows.shape[1]
    device = model.embeddings.weight.device
    for rows in windows.split(batch):
        cu_seqlens = range(0, rows.numel() + 1, length)
        model(rows.flatten().to(device), cu_seqlens, tap=collector.tap)
        advance(rows.numel())
    collector.check_tokens(windows.numel())
    return Statistics(source_sha256, (origin,), tuple(collector.layers))


def merge(parts: Sequence[Statistics]) -> Statistics:
    """Add up passes over the same checkpoint.

    Raises:
        PruningError: there is nothing to add, the checkpoints differ, or one pass is there twice.
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
        for origin in part.origins:
            if origin in origins:
                raise PruningError(
                    f"the same pass is there twice ({origin.as_json()}); draw with another seed"
                )
            origins.append(origin)
    layers = [
        {name: torch.stack([part.layers[i][name] for part in parts]).sum(0) for name in GRAMS}
        for i in range(len(first.layers))
    ]
    return Statistics(first.source_sha256, tuple(origins), tuple(layers))


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write one safetensors file, through a temporary name."""
    record = {
        "format": _FORMAT,
        "source_sha256": statistics.source_sha256,
        "origins": [origin.as_json() for origin in statistics.origins],
    }
    tensors = {
        f"layers.{i}.{name}": gram
        for i, layer in enumerate(statistics.layers)
        for name, gram in layer.items()
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
            count = len(list(f.keys())) // len(GRAMS)
            layers = tuple({name: f.get_tensor(f"layers.{i}.{name}") for name in GRAMS} for i in range(count))
            origins = tuple(
                Origin(**{key: value for key, value in origin.items() if key != "tokens"})
                for origin in record["origins"]
            )
            return Statistics(record["source_sha256"], origins, layers)
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as e:
        raise PruningError(
            f"{path} is not a statistics file of lowkey-prune ({type(e).__name__}: {e})"
        ) from e
