"""Runs a criterion over every layer and head of a checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray

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

    cuts: tuple[Cut, ...]
    """What surgery does to each linear-attention layer, in their order; layers may differ in the channels they keep."""
    report: list[list[Report]]
    """The criterion's figures for each of these layers and each of its heads."""

    @property
    def d_k(self) -> tuple[int, ...]:
        """Kept channels per head of each linear-attention layer."""
        return tuple(cut.keep.shape[1] for cut in self.cuts)

    @property
    def exchanges(self) -> int | None:
        """How often the criterion's search exchanged one channel for another, over all heads; None for a criterion that
        does not report it."""
        counts = [
            count
            for layer in self.report
            for head in layer
            for count in map(head.get, ("exchanges", "swaps"))
        ]
        reported = [int(count) for count in counts if count is not None]
        return sum(reported) if reported else None

    @property
    def rotated(self) -> bool:
        """Whether any layer's channels are mixtures."""
        return any(cut.rotation is not None for cut in self.cuts)


def widths_to_keep(spec: ModelSpec, keep: int) -> tuple[int, ...]:
    """`keep` channels in every linear-attention layer. Raises PruningError unless 1 <= keep <= d_k."""
    for layer, d_k in zip(spec.linear_layers, spec.d_k, strict=True):
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
        at = widths.index(min(widths))
        raise PruningError(
            f"ratio={ratio} leaves no channel of the {spec.d_k[at]} in layer {spec.linear_layers[at]}"
        )
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
    """Choose `widths[i]` channels in every head of the i-th linear-attention layer.

    Raises:
        PruningError: The criterion needs statistics and they are not there, or of another checkpoint.
    """
    check_statistics(criterion, statistics, checkpoint)
    cuts: list[Cut] = []
    report: list[list[Report]] = []
    for layer, n in zip(checkpoint.spec.linear_layers, widths, strict=True):
        choices = _choices(checkpoint, criterion, layer, n, statistics, seed)
        mixed = [choice.rotation for choice in choices if choice.rotation is not None]
        keep = torch.from_numpy(np.stack([choice.keep for choice in choices]))
        cuts.append(Cut(layer, keep, torch.from_numpy(np.stack(mixed)) if mixed else None))
        report.append([choice.report for choice in choices])
    return Selection(tuple(cuts), report)


def _choices(
    checkpoint: Checkpoint, criterion: Criterion, layer: int, n: int, statistics: Statistics | None, seed: int
) -> list[Choice]:
    """The criterion's choice of n channels for each head of a layer."""
    mixer = checkpoint.spec.deltas[layer]
    weights = _projections(checkpoint, layer) if criterion.weights else None
    of_layer = {}
    if statistics is not None:
        of_layer = {name: statistics.layers[layer][name].numpy() for name in criterion.statistics}
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
    rows = checkpoint.parameters(f"layers.{layer}.mixer.in_proj.")["weight"][: 2 * mixer.key_dim]
    weights: NDArray[np.float32] = rows.view(2, mixer.num_k_heads, mixer.d_k, -1).numpy()
    return weights
