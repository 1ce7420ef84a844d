"""`loss-aware`, for the products of keys with keys as well as of queries with keys.

A step of the delta rule reads the state twice: with q for the output, and with k for what is taken back before the
value is written, S^T k. Written out, a chunk's outputs are a function of Q K^T and K K^T (arXiv 2406.06484, section
3.2), and a channel that no query reads may be what keeps keys apart: a trained model can send tokens that are not worth
remembering there, and once it is gone their L2-normalised keys fall on all other channels.

The two matrices of products count alike, so M is the sum of Gq o Gk and of Gk o Gk, each over the sum of its entries.
"""

import numpy as np

from pruning.criteria.base import Choice, Criterion, Head
from pruning.criteria.bilinear import maximise, squared_cosine
from pruning.criteria.loss_aware import loss_weights


class ReadWrite(Criterion):
    name = "read-write"
    summary = "loss-aware, for the products k.k as well as q.k (needs gradients)"
    statistics = ("q_normalised", "k_normalised", "gate_fisher")

    def select(self, head: Head, n: int) -> Choice:
        w = loss_weights(head)
        keys = w[:, None] * w * head.statistics["k_normalised"]
        m = np.zeros_like(keys)
        for products in (head.statistics["q_normalised"] * keys, head.statistics["k_normalised"] * keys):
            total = products.sum()
            if total > 0:  # a head may have no queries, or no keys at all
                m += products / total
        keep, exchanges = maximise(m, n)
        return Choice(keep, {"exchanges": exchanges, "squared_cosine": squared_cosine(m, keep)})
