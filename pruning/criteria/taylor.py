"""Largest first-order effect of the projection rows on the loss (LLM-Pruner, arXiv 2305.11627, eq. 3): a channel's
score is sum_j |Wq_ij dL/dWq_ij| + |Wk_ij dL/dWk_ij|, with the gradients summed over the text before the product."""

import numpy as np

from pruning.criteria.base import Choice, Criterion, Head, largest


class Taylor(Criterion):
    name = "taylor"
    summary = "largest weight times gradient of the projection rows (needs gradients)"
    statistics = ("q_gradient", "k_gradient")
    weights = True

    def select(self, head: Head, n: int) -> Choice:
        assert head.weights is not None
        gradients = [head.statistics[name] for name in self.statistics]
        q, k = (np.abs(w * g).sum(1) for w, g in zip(head.weights, gradients, strict=True))
        return largest(q + k, n)
