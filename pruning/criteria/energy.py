"""Largest energy: a channel's score is E[q_i^2] E[k_i^2] of the L2-normalised rows."""

from pruning.criteria.base import Choice, Criterion, Head, largest


class Energy(Criterion):
    name = "energy"
    summary = "largest mean square of q times that of k"
    statistics = ("q_normalised", "k_normalised")

    def select(self, head: Head, n: int) -> Choice:
        q, k = (head.statistics[name].diagonal() for name in self.statistics)
        return largest(q * k, n)
