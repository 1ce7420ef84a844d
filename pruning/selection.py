"""Runs a criterion over every layer and head of a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.spec import ModelSpec
from pruning.criteria import Choice, Criterion, Head
from pruning.criteria.base import Report
from pruning.errors import PruningError
from pruning.statistics import Statistics
from pruning.surgery import Cut


@dataclass(frozen=True)
class Selection:
    """Kept channels of a whole checkpoint."""

    keep: tuple[Tensor, ...]
    """Per layer int64 `[num_k_heads, n]`, ascending in each head; layers may differ in n."""
    report: list[list[Report]]
    """Per layer and head, the criterion's figures."""
    rotation: tuple[Tensor | None, ...] = ()
    """Per layer float64 `[num_k_heads, d_k, d_k]` where `keep` counts mixtures of channels (`surgery.Cut`), None where
    it counts the checkpoint's own; empty where it does so in every layer."""

    @property
    def d_k(self) -> tuple[int, ...]:
        return tuple(k.shape[1] for k in self.keep)

    @property
    def rotated(self) -> bool:
        """Whether any layer's channels are mixtures."""
        return any(r is not None for r in self.rotation)

    def cuts(self, spec: ModelSpec) -> list[Cut]:
        """What surgery does to each linear layer of a model of shape `spec`; `check_cuts` finds a wrong number."""
        rotations = self.rotation or (None,) * len(self.keep)
        return [Cut(*parts) for parts in zip(spec.linear_layers, self.keep, rotations, strict=False)]


def widths_to_keep(spec: ModelSpec, keep: int) -> tuple[int, ...]:
    """`keep` channels in every layer. Raises PruningError unless 1 <= keep <= d_k."""
    for layer, d_k in enumerate(spec.d_k):
        if not 1 <= keep <= d_k:
            raise PruningError(f"keep={keep} must be between 1 and {d_k}, the d_k of layer {layer}")
    return (keep,) * len(spec.d_k)


def widths_for_ratio(spec: ModelSpec, ratio: float) -> tuple[int, ...]:
    """What is left of each layer's d_k when the share `ratio` is removed, rounded to whole channels.

    Raises:
        PruningError: ratio is not inside (0, 1), or so large that no channel is left.
    """
    if not 0 < ratio < 1:
        raise PruningError(
            f"ratio={ratio} must be above 0 and below 1: the share of channels removed (0.5 halves)"
        )
    # As a fraction of whole numbers: 80 * (1 - 0.8) is 15.999999999999996 in floats.
    share = 1 - Fraction(str(ratio))
    widths = tuple(round(d_k * share) for d_k in spec.d_k)
    if min(widths) < 1:
        layer = widths.index(min(widths))
        raise PruningError(f"ratio={ratio} leaves no channel of the {spec.d_k[layer]} in layer {layer}")
    return widths


def check_statistics(criterion: Criterion, statistics: Statistics | None, checkpoint: Checkpoint) -> None:
    """Raises PruningError unless `statistics` hold, of this checkpoint, all that the criterion reads."""
    if not criterion.statistics:
        return
    if statistics is None:
        raise PruningError(f"method={criterion.name!r} needs calibration statistics")
    statistics.check_source(checkpoint)
    missing = [name for name in criterion.statistics if name not in statistics.names]
    if missing:
        raise PruningError(
            f"these statistics do not hold {', '.join(missing)}, which method={criterion.name!r} reads; "
            f"calibrate again with --method {criterion.name}"
        )


def select(
    checkpoint: Checkpoint,
    criterion: Criterion,
    widths: Sequence[int],
    *,
    statistics: Statistics | None = None,
    seed: int = 0,
) -> Selection:
    """Choose `widths[i]` channels in every head of layer i.

    Raises:
        PruningError: the criterion needs statistics and they are not there, or of another checkpoint.
    """
    check_statistics(criterion, statistics, checkpoint)
    keep: list[Tensor] = []
    report: list[list[Report]] = []
    rotation: list[Tensor | None] = []
    for layer, n in zip(checkpoint.spec.linear_layers, widths, strict=True):
        choices = _layer(checkpoint, criterion, layer, n, statistics, seed)
        keep.append(torch.from_numpy(np.stack([choice.keep for choice in choices])))
        report.append([choice.report for choice in choices])
        mixed = [choice.rotation for choice in choices if choice.rotation is not None]
        rotation.append(torch.from_numpy(np.stack(mixed)) if mixed else None)
    return Selection(tuple(keep), report, tuple(rotation))


def _layer(
    checkpoint: Checkpoint, criterion: Criterion, layer: int, n: int, statistics: Statistics | None, seed: int
) -> list[Choice]:
    mixer = checkpoint.spec.deltas[layer]
    weights = _projections(checkpoint, layer) if criterion.weights else None
    of_layer = {}
    if statistics is not None:
        sums = statistics.layers[checkpoint.spec.linear_layers.index(layer)]
        of_layer = {name: sums[name].numpy() for name in criterion.statistics}
    choices: list[Choice] = []
    for h in range(mixer.num_k_heads):
        head = Head(
            layer=layer,
            index=h,
            d_k=mixer.d_k,
            seed=seed,
            tokens=0 if statistics is None else statistics.tokens,
            statistics={name: s if name == "x_squares" else s[h] for name, s in of_layer.items()},
            weights=None if weights is None else (weights[0, h], weights[1, h]),
        )
        choices.append(criterion.select(head, n))
    return choices


def _projections(checkpoint: Checkpoint, layer: int) -> NDArray[np.float32]:
    """Rows of the q and k projections by head, `[2, num_k_heads, d_k, hidden]`.

    Read through the family's map to our fused input projection, whose rows begin with q | k for every family.
    """
    mixer = checkpoint.spec.deltas[layer]
    (parts,) = (
        m.theirs
        for m in checkpoint.family.tensors(checkpoint.spec)
        if (m.layer, m.role) == (layer, "in_proj")
    )
    rows = torch.cat([checkpoint.tensor(name).float() for name in parts])[: 2 * mixer.key_dim]
    weights: NDArray[np.float32] = rows.view(2, mixer.num_k_heads, mixer.d_k, -1).numpy()
    return weights
