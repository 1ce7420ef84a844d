"""What a criterion is: given one head, which n of its d_k key channels to keep."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pruning.statistics import StatisticName

Report = dict[str, float | int | None]
"""Figures about a choice, for `state_reduction.json`; None where a figure is not finite."""


@dataclass(frozen=True)
class Head:
    """One key head as a criterion sees it: what the criterion's declaration asked for, and nothing else."""

    layer: int
    index: int
    d_k: int
    seed: int
    """Seed of the whole selection; `generator` makes the head's own from it."""
    tokens: int = 0
    """How many tokens the statistics are sums over."""
    statistics: Mapping[StatisticName, NDArray[np.float64]] = field(default_factory=dict)
    """The head's part of the calibration statistics: Grams `[d_k, d_k]`, sums of rows `[d_k]`, `x_squares` `[hidden]`
    (of the layer, the same for all heads), weight gradients `[d_k, hidden]`, `gate_fisher` `[d_k]`."""
    weights: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    """The head's rows of the q and k projections, `[d_k, hidden]` each; None if the criterion does not read them."""

    def generator(self) -> np.random.Generator:
        """A generator that depends on (seed, layer, head) only, so the order of heads does not matter."""
        digest = hashlib.sha256(f"{self.seed}/{self.layer}/{self.index}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16], "little"))


@dataclass(frozen=True)
class Choice:
    """The kept channels of one head."""

    keep: NDArray[np.int64]
    """Indices of the kept channels, `[n]`, ascending and distinct."""
    report: Report = field(default_factory=dict)
    rotation: NDArray[np.float64] | None = None
    """Mixtures of the head's channels, `[d_k, d_k]` with orthonormal rows, which `keep` counts instead of the channels;
    None where channels are chosen. Either every head of a layer has one, or none does."""


class Criterion(ABC):
    """One way to choose channels. It declares what it needs and gets exactly that."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for help texts."""
    statistics: ClassVar[tuple[StatisticName, ...]] = ()
    """Names of the statistics that it reads; without any no calibration is run."""
    weights: ClassVar[bool] = False
    """Whether it reads the q and k projections."""
    mixes: ClassVar[bool] = False
    """Whether it keeps mixtures of channels (`Choice.rotation`) instead of channels."""

    @abstractmethod
    def select(self, head: Head, n: int) -> Choice:
        """Choose n channels, 1 <= n <= d_k; n = d_k keeps all."""


def largest(scores: NDArray[np.float64], n: int) -> Choice:
    """The n channels of the largest scores; equal scores go to the lowest channel. Reports their share of the sum."""
    keep = np.sort(np.argsort(-scores, kind="stable")[:n])
    total = float(scores.sum())
    return Choice(keep, {"score_share": float(scores[keep].sum()) / total if total > 0 else 1.0})
