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
from numpy.typing import ArrayLike, NDArray

from pruning.criteria.base import Choice, Criterion, Head


def squared_cosine(m: NDArray[np.float64], keep: NDArray[np.int64]) -> float:
    """The objective, in [0, 1]; 1 where all products are zero and so nothing can be lost."""
    total = float(m.sum())
    inside = float(m[np.ix_(keep, keep)].sum())
    return float(m[keep].sum()) ** 2 / (inside * total) if inside > 0 and total > 0 else float(total <= 0)


def _ratio(overlap: ArrayLike, inside: ArrayLike) -> NDArray[np.float64]:
    """overlap^2 / inside, 0 where inside is not positive (a set of channels that are never used)."""
    square = np.square(np.asarray(overlap, dtype=np.float64))
    return np.divide(square, inside, out=np.zeros_like(square), where=np.greater(inside, 0))


def maximise(m: NDArray[np.float64], n: int) -> tuple[NDArray[np.int64], int]:
    """The set of n channels that greedy removal and exchanges find, ascending, and the number of exchanges."""
    kept = greedy_removal(m, n)
    exchanges = _exchange(m, kept) if n < len(m) else 0
    return np.flatnonzero(kept), exchanges


def greedy_removal(m: NDArray[np.float64], n: int) -> NDArray[np.bool_]:
    """Mask `[d_k]` of the n channels left after removing, one at a time, the one that leaves the most."""
    rows, diagonal = m.sum(1), m.diagonal()
    kept = np.ones(len(m), dtype=bool)
    while kept.sum() > n:
        to_kept = m[:, kept].sum(1)
        values = _ratio(rows[kept].sum() - rows, to_kept[kept].sum() - 2 * to_kept + diagonal)
        values[~kept] = -1.0
        kept[int(values.argmax())] = False
    return kept


def _exchange(m: NDArray[np.float64], kept: NDArray[np.bool_]) -> int:
    """Make the best exchange until none helps, in place. Returns how many were made."""
    rows = m.sum(1)
    best, exchanges = _objective(rows, m, kept), 0
    while True:
        i, j = _best_exchange(rows, m, kept)
        kept[[i, j]] = False, True
        value = _objective(rows, m, kept)
        # The exchange has to gain more than rounding error, or two equal sets would take turns for ever.
        if not value > best * (1 + 1e-9):
            kept[[i, j]] = True, False
            return exchanges
        best = value
        exchanges += 1


def _objective(rows: NDArray[np.float64], m: NDArray[np.float64], kept: NDArray[np.bool_]) -> float:
    return float(_ratio(rows[kept].sum(), m[np.ix_(kept, kept)].sum()))


def _best_exchange(
    rows: NDArray[np.float64], m: NDArray[np.float64], kept: NDArray[np.bool_]
) -> tuple[int, int]:
    """The kept channel to drop and the dropped one to keep that together give the largest objective."""
    inside, outside = np.flatnonzero(kept), np.flatnonzero(~kept)
    to_kept, diagonal = m[:, kept].sum(1), m.diagonal()
    values = _ratio(
        rows[kept].sum() - rows[inside][:, None] + rows[outside],
        to_kept[kept].sum()
        + (diagonal - 2 * to_kept)[inside][:, None]
        + (diagonal + 2 * to_kept)[outside]
        - 2 * m[np.ix_(inside, outside)],
    )
    i, j = divmod(int(values.argmax()), len(outside))
    return int(inside[i]), int(outside[j])


class Bilinear(Criterion):
    name = "bilinear"
    summary = "best preserves the products q.k themselves"
    statistics = ("q_normalised", "k_normalised")

    def select(self, head: Head, n: int) -> Choice:
        m = head.statistics["q_normalised"] * head.statistics["k_normalised"]
        keep, exchanges = maximise(m, n)
        return Choice(keep, {"exchanges": exchanges, "squared_cosine": squared_cosine(m, keep)})
