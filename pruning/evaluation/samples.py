"""Means of samples with their standard errors."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Estimate:
    """A mean over samples."""

    mean: float
    standard_error: float | None
    """Standard error of the mean; None of a single sample."""

    def error(self, form: str, unit: float = 1) -> str:
        """The standard error behind a plus-minus sign, in units of which `unit` make 1; empty where there is none."""
        return "" if self.standard_error is None else f" ± {unit * self.standard_error:{form}}"


def estimate(samples: Tensor) -> Estimate:
    """Mean of independent samples of any shape."""
    samples = samples.flatten()
    error = float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else None
    return Estimate(float(samples.mean()), error)


def estimate_of_clusters(samples: Tensor, clusters: Tensor) -> Estimate:
    """Mean of samples `[n]` that are independent only if they are of different clusters.

    The standard error is the cluster-robust one (Liang and Zeger, Biometrika 73(1), 1986). With G clusters it is
    sqrt(G / (G - 1) * sum over clusters of (sum over the cluster of (sample - mean))^2) / n.

    Args:
        samples: float `[n]`, n of at least 1.
        clusters: int64 `[n]`, the number of each sample's cluster, from 0.
    """
    samples = samples.double()
    mean = float(samples.mean())
    sums = torch.zeros(int(clusters.max()) + 1, dtype=torch.float64)
    sums.index_add_(0, clusters, samples - mean)
    count = len(clusters.unique())
    error = math.sqrt(count / (count - 1) * float(sums.square().sum())) / len(samples) if count > 1 else None
    return Estimate(mean, error)
