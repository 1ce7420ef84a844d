"""Bytes of state against quality: every checkpoint with its states in every dtype, as tables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lowkey.words import Judged
from pruning.evaluation.bits import Bits
from pruning.evaluation.record import EvaluatedCheckpoint, Evaluation
from pruning.evaluation.samples import Estimate
from pruning.identifier_cells import distance, gained, points

BITS_LEGEND = (
    "States in each dtype: change in perplexity, and drift (rise in loss / KL, thousandths of a nat/token, by how many "
    "tokens the state has seen), against the same checkpoint with float32 states, with standard errors; KL against the "
    "first with float32 states; recall: right among the prompt's values / log-probability, means over numbers of "
    "pairs; identifiers that last occurred so many tokens ago: all tokens right, and how many points less that is than "
    "the first has with float32 states."
)
PARETO_LEGEND = (
    "Against the first checkpoint with float32 states. Front: no other has fewer bytes and no higher perplexity, or as "
    "many and a lower one; differences within the standard errors of the changes are none."
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
    header = ["checkpoint", "states", "bytes", "perplexity", "change", "KL", "recall", "front"]
    names = _names([entry.name for entry in evaluation.checkpoints])
    return header, [_row(names[choice.entry.name], choice) for choice in choices(evaluation)]


def _names(paths: Sequence[str]) -> dict[str, str]:
    """The last part of each path where that tells them apart, else all of it."""
    ends = {path: path.rstrip("/").rpartition("/")[2] for path in paths}
    return ends if len(set(ends.values())) == len(ends) else {path: path for path in paths}


def _row(name: str, choice: Choice) -> list[str]:
    bits = choice.bits
    return [
        name,
        bits.state_dtype,
        f"{bits.state_bytes:,}",
        f"{bits.perplexity.perplexity:.3f}",
        f"{100 * choice.rise:+.2f} %",
        "" if bits.divergence is None else f"{bits.divergence.kl:.5f}",
        _recalled(bits) if bits.recall else "",
        "yes" if choice.on_front else "",
    ]


def bits_cells(bits: Bits) -> dict[str, Judged]:
    """The figures of one dtype by their labels."""
    perplexity = f"{bits.perplexity.perplexity:.3f}"
    rise = bits.loss_rise
    cells = {
        "bytes": Judged(f"{bits.state_bytes:,}"),
        "perplexity": Judged(perplexity)
        if rise is None
        else gained(f"{perplexity} ({_percent(rise)})", rise),
    }
    if bits.divergence is not None:
        cells["KL"] = Judged(f"{bits.divergence.kl:.6f}")
    if bits.recall:
        cells["recall"] = Judged(f"{_recalled(bits)} / {fmean(r.log_prob for r in bits.recall):.2f}")
    for words in bits.identifiers or []:
        label, text = f"identifiers, {distance(words)} ago", f"{words.figures.exact.mean:.1%}"
        drop = None if words.drop is None else words.drop.exact
        cells[label] = Judged(text) if drop is None else gained(f"{text} (drop {points(drop)})", drop)
    for octave in bits.drift.octaves:
        if octave.loss_rise is not None and octave.kl is not None:
            cells[f"drift to {octave.end:,}"] = gained(
                f"{1000 * octave.loss_rise.mean:+.2f}{octave.loss_rise.error('.2f', 1000)} / "
                f"{1000 * octave.kl.mean:.3f}{octave.kl.error('.3f', 1000)}",
                octave.loss_rise,
            )
    return cells


def _recalled(bits: Bits) -> str:
    return f"{fmean(r.accuracy_among_values for r in bits.recall):.1%}"


def _percent(rise: Estimate) -> str:
    """A rise in loss as one in perplexity."""
    factor = math.exp(rise.mean)
    return f"{100 * (factor - 1):+.3f} %" + rise.error(".3f", 100 * factor)
