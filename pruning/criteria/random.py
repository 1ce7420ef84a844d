"""n channels at random: the baseline that every other criterion has to beat."""

import numpy as np

from pruning.criteria.base import Choice, Criterion, Head


class Random(Criterion):
    name = "random"
    summary = "channels drawn at random from --seed"

    def select(self, head: Head, n: int) -> Choice:
        return Choice(np.sort(head.generator().permutation(head.d_k)[:n]))
