"""Figure of the recall of identifiers."""

import math

from lowkey.words import counted
from pruning.evaluation.identifiers import IdentifierRecall
from pruning.evaluation.record import Evaluation
from pruning.evaluation.samples import Estimate
from pruning.identifier_cells import distance
from pruning.report.style import Figure, line, place, short, subplots


def identifiers(name: str, evaluation: Evaluation, number: int) -> list[Figure]:
    """Share of identifiers that are predicted whole, and how much less than by the baseline, by distance."""
    measured = [(i, e.name, e.identifiers) for i, e in enumerate(evaluation.checkpoints) if e.identifiers]
    if not measured:
        return []
    figure = subplots(["predicted whole, %", "drop from the first, points"], height=420)
    for i, checkpoint, found in measured:
        own = [(_middle(recall), recall.figures.exact) for recall in found]
        drop = [(_middle(recall), recall.drop.exact) for recall in found if recall.drop is not None]
        for column, drawn in enumerate((own, drop)):
            figure.add_scatter(
                x=[x for x, _ in drawn],
                y=[100 * share.mean for _, share in drawn],
                error_y=_bars([share for _, share in drawn]),
                name=short(checkpoint),
                legendgroup=str(i),
                showlegend=column == 0,
                **line(i),
                **place(column),
            )
    ticks = {_middle(recall): distance(recall) for _, _, found in measured for recall in found}
    labels = [label.replace(" to ", "<br>to ") for label in ticks.values()]
    figure.update_xaxes(title="tokens since it last began", type="log", tickvals=list(ticks), ticktext=labels)
    figure.update_yaxes(rangemode="tozero")
    first = measured[0][2]
    counts = ", ".join(f"{recall.occurrences:,} of {distance(recall)}" for recall in first)
    windows = counted(max(recall.windows for recall in first), "window")
    return [
        Figure(
            f"identifiers-{number}",
            "Identifiers that occurred before",
            f"{name}: identifiers whose every token is the most likely one, by how many tokens ago they last began "
            f"({counts} tokens ago, in {windows} of {evaluation.text}). Right: {short(evaluation.checkpoints[0].name)} "
            "minus each, on the same identifiers. Bars are standard errors over windows.",
            figure,
        )
    ]


def _middle(recall: IdentifierRecall) -> float:
    """Geometric middle of the range: the axis is logarithmic."""
    return math.sqrt(recall.begin * recall.end)


def _bars(shares: list[Estimate]) -> dict[str, object]:
    errors = [100 * (share.standard_error or 0.0) for share in shares]
    return {"array": errors, "thickness": 1.5, "width": 4}
