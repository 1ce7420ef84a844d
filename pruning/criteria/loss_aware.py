"""`bilinear`, with every channel weighed by how much the loss feels it.

In place of M = Gq o Gk stands w_i w_j M_ij, with w = (F / mean F)^(1/4) from the Fisher information F of a gate on each
channel (`pruning.gradients`). M alone counts products that the rest of the model may not care about; F alone does not
know which channels say the same thing. F is a squared gradient; its fourth root makes w_i w_j as large as a gradient.
"""

import numpy as np
from numpy.typing import NDArray

from pruning.criteria.base import Choice, Criterion, Head
from pruning.criteria.bilinear import maximise, squared_cosine


def loss_weights(head: Head) -> NDArray[np.float64]:
    """The weight of each channel, `[d_k]`: the fourth root of its Fisher information over the head's mean."""
    fisher = head.statistics["gate_fisher"]
    mean = fisher.mean()
    # A head that the loss does not feel at all: every channel alike.
    return (fisher / mean) ** 0.25 if mean > 0 else np.ones(head.d_k)


class LossAware(Criterion):
    name = "loss-aware"
    summary = "bilinear, weighed by each channel's effect on the loss (needs gradients)"
    statistics = ("q_normalised", "k_normalised", "gate_fisher")

    def select(self, head: Head, n: int) -> Choice:
        w = loss_weights(head)
        m = w[:, None] * w * head.statistics["q_normalised"] * head.statistics["k_normalised"]
        keep, exchanges = maximise(m, n)
        return Choice(keep, {"exchanges": exchanges, "squared_cosine": squared_cosine(m, keep)})
