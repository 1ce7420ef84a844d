"""State budgets: bytes -> widths, one for the whole model or one per layer.

Per layer, the rise in loss when that layer alone is reduced is measured at every aligned width. Rises of several layers
are taken to add up, and the budget is spent greedily: from the narrowest widths, always the widening that takes back
the most loss per byte.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.layers import DeltaMixer, Tap
from modeling.model import Model
from modeling.spec import ModelSpec
from pruning.calibration import Origin
from pruning.criteria import Criterion
from pruning.errors import PruningError
from pruning.evaluation import perplexity
from pruning.gradients import check_predicts
from pruning.progress import Advance, no_progress
from pruning.selection import Selection, select
from pruning.statistics import Statistics
from pruning.surgery import Cut

DEFAULT_ALIGN = 16
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}

Curve = Mapping[int, float]
"""The rise in loss, in nats per token, by the width that one layer alone keeps; 0 at the layer's own d_k."""


@dataclass(frozen=True)
class Budget:
    """How one state budget was spent over the layers."""

    state_bytes: int
    """The most bytes of state that a request may hold."""
    align: int
    """The widths are multiples of this."""
    curves: tuple[Curve, ...]
    """The error curve of each linear-attention layer, in order."""
    origin: Origin
    """The text that the curves were measured on."""

    def as_json(self) -> dict[str, Any]:
        return {
            "state_bytes": self.state_bytes,
            "align": self.align,
            "measured_on": self.origin.as_json(),
            "loss_rise": [{str(n): rise for n, rise in curve.items()} for curve in self.curves],
        }


def parse_bytes(text: str) -> int:
    """`430080`, `13MB`, `1.5 GiB` -> bytes; K, M and G are powers of 1000, Ki, Mi and Gi of 1024.

    pydantic's ByteSize, which reads the server's options, would take `1,000` for one byte and refuse `2Ki`.

    Raises:
        PruningError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?", text.strip().upper())
    if match is None:
        raise PruningError(f"state_bytes={text!r} is no size; give bytes or a number with a unit, like 13MB")
    return int(Fraction(match[1]) * _UNITS[match[2] or ""])


def aligned_widths(d_k: int, align: int) -> tuple[int, ...]:
    """Multiples of `align` below d_k, and d_k itself.

    Raises:
        PruningError: `align` is odd or below 2.
    """
    if align < 2 or align % 2:
        raise PruningError(f"align={align} must be an even number of at least 2")
    return (*range(align, d_k, align), d_k)


def widths_for_bytes(spec: ModelSpec, limit: int, align: int) -> tuple[int, ...]:
    """The largest aligned width for all layers whose state is at most `limit` bytes.

    Raises:
        PruningError: not even the smallest one fits.
    """
    candidates = [(n,) * len(spec.linear_layers) for n in aligned_widths(min(spec.d_k), align)]
    _check_limit(spec, candidates[0], limit)
    return max(widths for widths in candidates if spec.with_d_k(widths).state_bytes(0) <= limit)


def widths_per_layer(spec: ModelSpec, curves: Sequence[Curve], limit: int) -> tuple[int, ...]:
    """Widths whose state is at most `limit` bytes, spent where it takes back the most loss per byte.

    A widening may skip widths, so a flat stretch of a curve hides nothing behind it; one that takes no loss back
    is not made, and the state may then be below the limit.

    Raises:
        PruningError: not even the smallest widths fit.
    """
    widths = [min(curve) for curve in curves]
    _check_limit(spec, widths, limit)
    while True:
        held = spec.with_d_k(tuple(widths)).state_bytes(0)
        best, wider = 0.0, widths
        for at, curve in enumerate(curves):
            for n in (n for n in sorted(curve) if n > widths[at]):
                candidate = [*widths[:at], n, *widths[at + 1 :]]
                size = spec.with_d_k(tuple(candidate)).state_bytes(0)
                gain = (curve[widths[at]] - curve[n]) / (size - held)
                if size <= limit and gain > best:
                    best, wider = gain, candidate
        if wider is widths:
            return tuple(widths)
        widths = wider


def _check_limit(spec: ModelSpec, smallest: Sequence[int], limit: int) -> None:
    size = spec.with_d_k(tuple(smallest)).state_bytes(0)
    if size > limit:
        raise PruningError(
            f"state_bytes={limit} is below {size}, the state with d_k {min(smallest)}; "
            "raise it, or allow narrower widths with --align"
        )


def spend(
    checkpoint: Checkpoint,
    criterion: Criterion,
    limit: int,
    align: int,
    model: Model,
    windows: Tensor,
    origin: Origin,
    *,
    statistics: Statistics | None = None,
    seed: int = 0,
    advance: Advance = no_progress,
) -> tuple[tuple[int, ...], Budget]:
    """Measure error curves of the criterion's choices on `windows` int64 `[count, length]` and spend `limit` bytes.

    Raises:
        PruningError: the limit is too small, or whatever `select` and `error_curves` raise.
    """
    spec = checkpoint.spec
    check_spendable(spec, criterion, limit, align, windows.shape[1])
    choices = []
    for n in aligned_widths(max(spec.d_k), align):
        widths = [min(n, d_k) for d_k in spec.d_k]
        choices.append(select(checkpoint, criterion, widths, statistics=statistics, seed=seed))
    curves = error_curves(model, choices, windows, advance=advance)
    return widths_per_layer(spec, curves, limit), Budget(limit, align, curves, origin)


def check_spendable(
    spec: ModelSpec, criterion: Criterion, limit: int, align: int, window_length: int
) -> None:
    """Find out before any work whether `spend` can do its own, on windows of so many tokens.

    Raises:
        PruningError: not even the smallest widths fit, the criterion keeps what can't be measured in one layer alone,
            or the windows have no token to predict.
    """
    _check_limit(spec, [aligned_widths(d_k, align)[0] for d_k in spec.d_k], limit)
    if criterion.mixes:
        raise PruningError(
            f"method={criterion.name!r} mixes channels, and --per-layer measures masks of the model's own; "
            "give the layers one width, or choose another method"
        )
    check_predicts(window_length)


def curve_passes(spec: ModelSpec, align: int) -> int:
    """How often `spend` runs the windows through the model."""
    return 1 + sum(len(aligned_widths(d_k, align)) - 1 for d_k in spec.d_k)


def error_curves(
    model: Model, choices: Sequence[Selection], windows: Tensor, *, advance: Advance = no_progress
) -> tuple[Curve, ...]:
    """The rise in loss on `windows` int64 `[count, length]` when a layer alone keeps each of its `choices`, for each
    linear-attention layer in order.

    Raises:
        PruningError: A window has no token to predict, or the loss is not finite.
    """
    check_predicts(windows.shape[1])
    dense = perplexity(model, windows, advance=advance).loss
    curves: list[Curve] = []
    cuts_by_layer = zip(*(choice.cuts for choice in choices), strict=True)
    for mixer, cuts in zip(model.deltas.values(), cuts_by_layer, strict=True):
        curve = {}
        for n, cut in {cut.keep.shape[1]: cut for cut in cuts}.items():
            if n < mixer.spec.d_k:
                with reduced_alone(mixer, cut) as tap:
                    curve[n] = perplexity(model, windows, tap=tap, advance=advance).loss - dense
        curves.append({**curve, mixer.spec.d_k: 0.0})
    return tuple(curves)


@contextmanager
def reduced_alone(mixer: DeltaMixer, cut: Cut) -> Iterator[Tap]:
    """A tap that makes the mixer of the layer compute what it would with the channels that `cut` keeps alone.

    A sliced layer scales q by n^-1/2, so its o is sqrt(d_k / n) times that of the masked one. The output norm cancels
    this once its eps is n / d_k of what it was, as it is inside the block.
    """
    m, norm = mixer.spec, mixer.o_norm
    weight = mixer.in_proj.weight
    mask = torch.zeros(m.num_k_heads, m.d_k).scatter(1, cut.keep, 1.0).to(weight)

    def tap(i: int, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return (q * mask, k * mask) if i == cut.layer else (q, k)

    eps = norm.eps
    norm.eps = eps * cut.keep.shape[1] / m.d_k
    try:
        yield tap
    finally:
        norm.eps = eps
