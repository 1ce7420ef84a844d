"""Recall of identifiers as cells of tables."""

from collections.abc import Sequence

from lowkey.words import Judged, judged
from pruning.evaluation.identifiers import IdentifierRecall
from pruning.evaluation.samples import Estimate

IDENTIFIERS_LEGEND = (
    "Identifiers that last occurred so many tokens ago: all tokens right / first token right / log-probability; drop: "
    "how much less than the first has, in points, points and nats, with standard errors over windows."
)


def identifier_cells(found: Sequence[IdentifierRecall]) -> dict[str, Judged]:
    """The figures of each range of distances by their labels, and below them how much less they are than the
    baseline's."""
    cells: dict[str, Judged] = {}
    for recall in found:
        own, drop = recall.figures, recall.drop
        cells[f"identifiers, {distance(recall)} ago"] = Judged(
            f"{_share(own.exact)} / {_share(own.first_token)} / {own.log_prob.mean:.2f}"
        )
        if drop is not None:
            log_prob = f"{drop.log_prob.mean:+.3f}{drop.log_prob.error('.3f')}"
            cells[f"drop, {distance(recall)} ago"] = gained(
                f"{points(drop.exact)} / {points(drop.first_token)} / {log_prob}", drop.exact
            )
    return cells


def distance(recall: IdentifierRecall) -> str:
    """The range of distances in words."""
    return f"{recall.begin:,} to {recall.end - 1:,}"


def points(difference: Estimate) -> str:
    """A difference of shares in percentage points, with its standard error."""
    return f"{100 * difference.mean:+.2f}{difference.error('.2f', 100)}"


def gained(text: str, drop: Estimate) -> Judged:
    """A cell with the mark of a drop: the smaller the better, and no mark within two standard errors."""
    return judged(text, -drop.mean, 2 * (drop.standard_error or 0.0))


def _share(share: Estimate) -> str:
    return f"{share.mean:.1%}{share.error('.1f', 100)}"
