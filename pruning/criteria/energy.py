"""Largest energy: a channel's score is E[q_i^2] E[k_i^2] of the L2-normalised rows."""

from pruning.criteria.base import Choice, Head, largest
from pruning.statistics import StatisticName


class Energy:
    name = "energy"
    summary = "largest mean square of q times that of k"
    statistics: tuple[StatisticName, ...] = ("q_normalised", "k_normalised")
    weights = False
    mixes = False

    def select(self, head: Head, n: int) -> Choice:
        q, k = (head.statistics[name].diagonal() for name in self.statistics)
        return largest(q * k, n)
