"""Largest weights: a channel's score is sum_j |Wq_ij| + |Wk_ij| over its rows of the q and k projections."""

import numpy as np

from pruning.criteria.base import Choice, Criterion, Head, largest


class L1(Criterion):
    name = "l1"
    summary = "largest L1 norm of the q and k projection rows (needs no text)"
    weights = True

    def select(self, head: Head, n: int) -> Choice:
        assert head.weights is not None
        q, k = head.weights
        return largest(np.abs(q).sum(1, dtype=np.float64) + np.abs(k).sum(1, dtype=np.float64), n)
