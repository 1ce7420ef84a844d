"""Bytes of state against quality: every checkpoint with its states in every dtype, as tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pruning.evaluation.bits import Bits, Estimate
from pruning.evaluation.record import EvaluatedCheckpoint, Evaluation

BITS_LEGEND = (
    "Change in perplexity and KL (nats/token) are against the first checkpoint with float32 states; by rounding: "
    "against the same checkpoint with float32 states, with its standard error over windows. Recall: right among the "
    "prompt's values / log-probability, means over numbers of pairs. Front: no other has fewer bytes and no higher "
    "perplexity, or as many and a lower one."
)
DRIFT_LEGEND = (
    "Rise in loss against the same checkpoint with float32 states, and KL(float32 || this), nats/token, by how many "
    "tokens the state has seen; with standard errors over blocks of tokens."
)


@dataclass(frozen=True)
class Choice:
    """One checkpoint with its states in one dtype."""

    entry: EvaluatedCheckpoint
    bits: Bits
    rise: float
    """Perplexity over that of the first checkpoint with float32 states, less 1."""
    on_front: bool
    """Whether no other choice is as good in bytes and in perplexity and better in one of them."""


def choices(evaluation: Evaluation) -> list[Choice]:
    """Everything that `bits` measured, the fewest bytes first."""
    found = [(entry, bits) for entry in evaluation.checkpoints for bits in entry.bits or []]
    if not found:
        return []
    first = found[0][1].perplexity.perplexity
    points = [(bits.state_bytes, bits.perplexity.perplexity) for _, bits in found]
    result = [
        Choice(entry, bits, point[1] / first - 1, not any(_better(other, point) for other in points))
        for (entry, bits), point in zip(found, points, strict=True)
    ]
    return sorted(result, key=lambda c: (c.bits.state_bytes, c.bits.perplexity.perplexity))


def _better(a: tuple[int, float], b: tuple[int, float]) -> bool:
    return a != b and a[0] <= b[0] and a[1] <= b[1]


def pareto_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header, and one row for each of the `choices`."""
    header = [
        *("checkpoint", "state dtype", "state bytes", "of first", "perplexity", "change"),
        *("by rounding", "KL", "recall", "front"),
    ]
    found = choices(evaluation)
    first = next((e.bits[0].state_bytes for e in evaluation.checkpoints if e.bits), 1)
    return header, [_row(choice, first) for choice in found]


def _row(choice: Choice, first: int) -> list[str]:
    bits = choice.bits
    return [
        choice.entry.name,
        bits.state_dtype,
        f"{bits.state_bytes:,}",
        f"{bits.state_bytes / first:.1%}",
        f"{bits.perplexity.perplexity:.3f}",
        f"{100 * choice.rise:+.2f} %",
        "" if bits.loss_rise is None else _percent(bits.loss_rise),
        "" if bits.divergence is None else f"{bits.divergence.kl:.6f}",
        _recall(bits),
        "yes" if choice.on_front else "",
    ]


def _recall(bits: Bits) -> str:
    if not bits.recall:
        return ""
    right, log_prob = (
        fmean(r.accuracy_among_values for r in bits.recall),
        fmean(r.log_prob for r in bits.recall),
    )
    return f"{right:.1%} / {log_prob:.2f}"


def _percent(rise: Estimate) -> str:
    """A rise in loss as one in perplexity."""
    factor = math.exp(rise.mean)
    return f"{100 * (factor - 1):+.3f} %" + _error(rise, 100 * factor, ".3f")


def _error(estimate: Estimate, unit: float, form: str) -> str:
    error = estimate.standard_error
    return "" if error is None else f" ± {unit * error:{form}}"


def drift_table(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Header, and one row for each checkpoint and dtype but float32."""
    measured = [
        (entry.name, bits) for entry in evaluation.checkpoints for bits in entry.bits or [] if bits.loss_rise
    ]
    ends: Sequence[int] = sorted({octave.end for _, bits in measured for octave in bits.drift.octaves})
    header = ["checkpoint", "state dtype", *(f"to {end:,}" for end in ends)]
    rows = []
    for name, bits in measured:
        cells = {octave.end: _drift(octave.loss_rise, octave.kl) for octave in bits.drift.octaves}
        rows.append([name, bits.state_dtype, *(cells.get(end, "") for end in ends)])
    return header, rows


def _drift(rise: Estimate | None, kl: Estimate | None) -> str:
    if rise is None or kl is None:
        return ""
    return f"{rise.mean:+.5f}{_error(rise, 1, '.5f')}\nKL {kl.mean:.6f}{_error(kl, 1, '.6f')}"
