"""Principal components of the keys: a baseline that mixes channels instead of choosing some.

q and k are rotated to the eigenvectors of k's covariance (post convolution and SiLU, pre L2), and the n of the largest
variance are kept. Were q and k linear in the projections, rotating the projections' rows would be exactly that. They
are not: convolution and SiLU act on each channel by itself, and stock layers have nothing behind them that could
rotate. So the projections are rotated, a mixture is convolved with the mean of its channels' filters
(`surgery.rotate_rows`), and SiLU meets other values than those that the covariance was taken of.

An eigenvector's sign is free and SiLU is not odd: it is taken so that the keys' mean is positive along it.
"""

import numpy as np

from pruning.criteria.base import Choice, Criterion, Head


class PCA(Criterion):
    name = "pca"
    summary = (
        "rotates to the keys' principal components (a baseline: exact only without convolution and SiLU)"
    )
    statistics = ("k", "k_sum")
    mixes = True

    def select(self, head: Head, n: int) -> Choice:
        keep = np.arange(n)
        if n == head.d_k:
            return Choice(keep, {"variance_share": 1.0})
        mean = head.statistics["k_sum"] / head.tokens
        values, vectors = np.linalg.eigh(head.statistics["k"] / head.tokens - np.outer(mean, mean))
        rotation = vectors.T[::-1]
        rotation = rotation * np.where(rotation @ mean < 0, -1.0, 1.0)[:, None]
        variances = values[::-1].clip(min=0.0)
        total = float(variances.sum())
        share = float(variances[:n].sum()) / total if total > 0 else 1.0
        return Choice(keep, {"variance_share": share}, np.ascontiguousarray(rotation))
