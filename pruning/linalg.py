"""Column selection from a Gram matrix: pivoted Cholesky and strong rank-revealing QR, in float64.

With samples A `[rows, d_k]` and G = A^T A, the Cholesky factorisation of G that pivots on the largest remaining
diagonal picks the columns that QR with column pivoting picks from A: both diagonals are the squared distances of the
columns from the span of those already picked. So the d_k x d_k Gram is all that has to be kept of any number of rows.

The strong form (Gu and Eisenstat, SIAM J. Sci. Comput. 17, 1996) then exchanges a picked column i for another j while
that raises the volume of the picked columns by more than a factor f. Everything it asks for stands in one symmetric
matrix, the sweep tableau of G at the picked set S (R is the rest):

    T_SS = -G_SS^-1      T_SR = G_SS^-1 G_SR      T_RR = G_RR - G_RS G_SS^-1 G_SR

    rho_ij^2 = T_ij^2 - T_ii T_jj = det G_S'S' / det G_SS,   S' = S - i + j

and an exchange is one sweep and one unsweep, O(d_k^2). numpy's elementwise loops run on one thread, so the same Gram
gives the same choice under any thread settings.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def rank_tolerance(gram: Matrix) -> float:
    """Below this a remaining diagonal is rounding error: d_k * machine epsilon * the largest diagonal."""
    return float(len(gram) * np.finfo(np.float64).eps * gram.diagonal().max(initial=0.0))


def pivoted_cholesky(gram: Matrix) -> list[int]:
    """Pivots of the diagonal-pivoted Cholesky factorisation of `gram` `[d_k, d_k]`, in the order they are picked.

    Ends where no remaining diagonal exceeds `rank_tolerance`, so its length is the numerical rank. Equal diagonals
    are picked lowest index first.
    """
    tolerance = rank_tolerance(gram)
    rest = gram.copy()
    pivots: list[int] = []
    remaining = gram.diagonal().copy()
    while len(pivots) < len(gram):
        j = int(remaining.argmax())
        if not remaining[j] > tolerance:
            break
        row = rest[j] / math.sqrt(remaining[j])
        rest -= np.outer(row, row)
        pivots.append(j)
        remaining = rest.diagonal().copy()
        remaining[pivots] = -np.inf
    return pivots


def sweep(tableau: Matrix, j: int) -> None:
    """Move index j into the picked set, in place."""
    _exchange(tableau, j, 1.0)


def unsweep(tableau: Matrix, i: int) -> None:
    """Move index i out of the picked set, in place: the inverse of `sweep`."""
    _exchange(tableau, i, -1.0)


def _exchange(tableau: Matrix, j: int, sign: float) -> None:
    pivot = tableau[j, j]
    row = tableau[j].copy()
    tableau -= np.outer(row, row / pivot)
    tableau[j] = tableau[:, j] = sign * row / pivot
    tableau[j, j] = -1.0 / pivot


@dataclass(frozen=True)
class StrongRRQR:
    """What `strong_rrqr` picked, and how."""

    keep: NDArray[np.int64]
    """Indices of the kept channels, `[n]`, ascending."""
    rank: int
    """Numerical rank of the Gram."""
    swaps: int
    """How many exchanges followed the pivoted factorisation."""
    condition: float
    """2-norm condition number of the kept part of the Gram (infinite where it is singular)."""
    energy: float
    """Share of the Gram's trace in the kept channels."""


def strong_rrqr(gram: Matrix, n: int, *, f: float = 1.5) -> StrongRRQR:
    """Pick n of the d_k columns behind `gram` `[d_k, d_k]` by strong rank-revealing QR with bound `f`.

    Where n exceeds the numerical rank, the columns past the rank are those of the largest diagonal: they add nothing
    to the span, whichever they are.
    """
    pivots = pivoted_cholesky(gram)
    picked = np.zeros(len(gram), dtype=bool)
    tableau = gram.copy()
    for j in pivots[:n]:
        sweep(tableau, j)
        picked[j] = True
    swaps = _exchange_while_volume_grows(tableau, picked, f)
    missing = n - int(picked.sum())
    if missing > 0:
        energy = np.where(picked, -np.inf, gram.diagonal())
        picked[np.argsort(-energy, kind="stable")[:missing]] = True
    keep = np.flatnonzero(picked)
    trace = float(gram.trace())
    return StrongRRQR(
        keep=keep,
        rank=len(pivots),
        swaps=swaps,
        condition=_condition(gram[np.ix_(keep, keep)]),
        energy=float(gram.diagonal()[keep].sum()) / trace if trace > 0 else 0.0,
    )


def _exchange_while_volume_grows(tableau: Matrix, picked: NDArray[np.bool_], f: float) -> int:
    """Exchanges on `tableau` and `picked`, in place, until no rho exceeds f. Returns how many."""
    # Column pivoting is within a factor n! of the largest volume and each exchange gains more than f, so exact
    # arithmetic ends before this bound; rounding on a nearly singular Gram might otherwise go round in circles.
    n = int(picked.sum())
    bound = math.ceil(math.lgamma(n + 1) / math.log(f))
    for swaps in range(bound):
        inside, outside = np.flatnonzero(picked), np.flatnonzero(~picked)
        if not len(inside) or not len(outside):
            return swaps
        diagonal = tableau.diagonal()
        gain = tableau[np.ix_(inside, outside)] ** 2 - np.outer(diagonal[inside], diagonal[outside])
        best = int(gain.argmax())
        if not gain.flat[best] > f * f:
            return swaps
        i, j = inside[best // len(outside)], outside[best % len(outside)]
        unsweep(tableau, i)
        sweep(tableau, j)
        picked[i], picked[j] = False, True
    return bound


def _condition(gram: Matrix) -> float:
    values = np.linalg.eigvalsh(gram)
    return float(values[-1] / values[0]) if values[0] > 0 else math.inf
