"""Largest weights times what they are multiplied with (Wanda, arXiv 2306.11695, eq. 1): a channel's score is
sum_j (|Wq_ij| + |Wk_ij|) * rms(x_j), with x the input of the projections."""

import numpy as np

from pruning.criteria.base import Choice, Criterion, Head, largest


class Wanda(Criterion):
    name = "wanda"
    summary = "largest projection rows, each weight times the size of its input"
    statistics = ("x_squares",)
    weights = True

    def select(self, head: Head, n: int) -> Choice:
        assert head.weights is not None
        q, k = head.weights
        # The root of the sum instead of the mean: a common factor changes no choice.
        return largest((np.abs(q) + np.abs(k)) @ np.sqrt(head.statistics["x_squares"]), n)
