"""Largest first-order effect of the projection rows on the loss (LLM-Pruner, arXiv 2305.11627, eq. 3): a channel's
score is sum_j |Wq_ij dL/dWq_ij| + |Wk_ij dL/dWk_ij|, with the gradients summed over the text before the product."""

import numpy as np

from pruning.criteria.base import Choice, Head, largest
from pruning.statistics import StatisticName


class Taylor:
    name = "taylor"
    summary = "largest weight times gradient of the projection rows (needs gradients)"
    statistics: tuple[StatisticName, ...] = ("q_gradient", "k_gradient")
    weights = True
    mixes = False

    def select(self, head: Head, n: int) -> Choice:
        assert head.weights is not None
        gradients = [head.statistics[name] for name in self.statistics]
        q, k = (np.abs(w * g).sum(1) for w, g in zip(head.weights, gradients, strict=True))
        return largest(q + k, n)
