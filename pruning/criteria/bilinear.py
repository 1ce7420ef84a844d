"""Keep the products q.k themselves.

Dropping the channels R changes the matrix of all products Q K^T by Q_R K_R^T, and

    ||Q_R K_R^T||_F^2 = sum_{i,j in R} (Q^T Q)_ij (K^T K)_ij = 1_R^T M 1_R,   M = Gq o Gk   (o = elementwise)

so two Grams of L2-normalised rows hold all that is needed; M is positive semidefinite (Schur product theorem). A
common scale on the products is cancelled by the output norm, so what counts is the angle between the kept products
and all of them, whose squared cosine is

    (1^T M 1_I)^2 / ((1_I^T M 1_I) (1^T M 1))

It is maximised over the kept set I by greedy removal, then by the best exchange until none helps.
"""

import numpy as np
from numpy.typing import NDArray

from pruning.criteria.base import Choice, Head
from pruning.statistics import GramName

# An exchange has to gain more than rounding error, or two equal sets would take turns.
_GAIN = 1 + 1e-9


def squared_cosine(m: NDArray[np.float64], keep: NDArray[np.int64]) -> float:
    """The objective, in [0, 1]; 1 where all products are zero and so nothing can be lost."""
    total = float(m.sum())
    inside = float(m[np.ix_(keep, keep)].sum())
    return float(m[keep].sum()) ** 2 / (inside * total) if inside > 0 and total > 0 else float(total <= 0)


def _ratio(overlap: NDArray[np.float64], inside: NDArray[np.float64]) -> NDArray[np.float64]:
    """overlap^2 / inside, 0 where inside is not positive (a set of channels that are never used)."""
    return np.divide(overlap**2, inside, out=np.zeros_like(overlap), where=inside > 0)


def maximise(m: NDArray[np.float64], n: int) -> tuple[NDArray[np.int64], int]:
    """The set of n channels that greedy removal and exchanges find, ascending, and the number of exchanges."""
    rows, diagonal = m.sum(1), m.diagonal()
    kept = np.ones(len(m), dtype=bool)
    while (count := int(kept.sum())) > n:
        to_kept = m[:, kept].sum(1)
        values = _ratio(rows[kept].sum() - rows, to_kept[kept].sum() - 2 * to_kept + diagonal)
        values[~kept] = -1.0
        kept[int(values.argmax())] = False
        assert int(kept.sum()) == count - 1
    exchanges = 0
    while n < len(m):
        inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
        to_kept = m[:, kept].sum(1)
        overlap, within = rows[kept].sum(), to_kept[kept].sum()
        current = overlap**2 / within if within > 0 else 0.0
        values = _ratio(
            overlap - rows[inside][:, None] + rows[outside],
            within
            + (diagonal - 2 * to_kept)[inside][:, None]
            + (diagonal + 2 * to_kept)[outside]
            - 2 * m[np.ix_(inside, outside)],
        )
        best = int(values.argmax())
        if not values.flat[best] > current * _GAIN:
            break
        kept[inside[best // len(outside)]] = False
        kept[outside[best % len(outside)]] = True
        exchanges += 1
    return np.flatnonzero(kept), exchanges


class Bilinear:
    name = "bilinear"
    summary = "best preserves the products q.k themselves"
    grams: tuple[GramName, ...] = ("q_normalised", "k_normalised")
    weights = False

    def select(self, head: Head, n: int) -> Choice:
        m = head.grams["q_normalised"] * head.grams["k_normalised"]
        keep, exchanges = maximise(m, n)
        return Choice(keep, {"exchanges": exchanges, "squared_cosine": squared_cosine(m, keep)})
