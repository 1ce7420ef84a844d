"""Figures of a paired test: per variant, and as ratios with bootstrap intervals over rounds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from loadtest.client import Result, quantile

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
RESAMPLES = 1000
MIN_ROUNDS = 5
"""The fewest rounds that make an interval: of fewer, those that are drawn are too much alike."""


@dataclass(frozen=True)
class Objectives:
    """What a request must keep to count as good. Seconds."""

    ttft_s: float
    itl_s: float
    """The most seconds between two tokens, as the mean over a request."""
    total_s: float | None = None

    def met(self, result: Result) -> bool:
        if result.error is not None or not result.token_times:
            return False
        return (
            result.ttft_s <= self.ttft_s
            and result.mean_itl_s <= self.itl_s
            and (self.total_s is None or result.ended - result.sent <= self.total_s)
        )


@dataclass(frozen=True)
class Slice:
    """The requests that one variant answered in one round, and the seconds that they took."""

    variant: str
    round: int
    seconds: float
    results: list[Result]


@dataclass
class Observed:
    """What several slices of one variant add up to."""

    requests: int = 0
    good: int = 0
    errors: int = 0
    tokens: int = 0
    seconds: float = 0.0
    ttft: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)
    total: list[float] = field(default_factory=list)
    state_bytes: list[float] = field(default_factory=list)


def observe(slices: Sequence[Slice], objectives: Objectives) -> Observed:
    """Pool slices; latencies are of requests without an error."""
    seen = Observed()
    for each in slices:
        seen.seconds += each.seconds
        for result in each.results:
            seen.requests += 1
            seen.good += objectives.met(result)
            if result.error is not None or not result.token_times:
                seen.errors += 1
                continue
            seen.tokens += result.tokens
            seen.ttft.append(result.ttft_s)
            seen.itl += result.itl_s
            seen.total.append(result.ended - result.sent)
            if result.state_bytes is not None:
                seen.state_bytes.append(result.state_bytes)
    return seen


def _quantile(pick: Callable[[Observed], list[float]], q: float) -> Callable[[Observed], float]:
    return lambda seen: quantile(pick(seen), q)


def _rate(pick: Callable[[Observed], int]) -> Callable[[Observed], float]:
    return lambda seen: pick(seen) / seen.seconds if seen.seconds else float("nan")


FIGURES: dict[str, Callable[[Observed], float]] = {
    "tokens_per_second": _rate(lambda seen: seen.tokens),
    "goodput_per_second": _rate(lambda seen: seen.good),
    "ttft_p50_s": _quantile(lambda seen: seen.ttft, 0.5),
    "ttft_p95_s": _quantile(lambda seen: seen.ttft, 0.95),
    "ttft_p99_s": _quantile(lambda seen: seen.ttft, 0.99),
    "itl_p50_s": _quantile(lambda seen: seen.itl, 0.5),
    "itl_p95_s": _quantile(lambda seen: seen.itl, 0.95),
    "itl_p99_s": _quantile(lambda seen: seen.itl, 0.99),
    "total_p50_s": _quantile(lambda seen: seen.total, 0.5),
    "total_p95_s": _quantile(lambda seen: seen.total, 0.95),
    "total_p99_s": _quantile(lambda seen: seen.total, 0.99),
    "state_bytes": lambda seen: float(np.mean(seen.state_bytes)) if seen.state_bytes else float("nan"),
}
"""How each figure is computed, by its name. Latencies count from the intended arrival."""


@dataclass(frozen=True)
class Ratio:
    """Variant over baseline, with a 95 % interval; NaN for its ends with fewer than `MIN_ROUNDS` rounds."""

    value: float
    low: float
    high: float


def ratios(
    slices: Sequence[Slice], variant: str, baseline: str, objectives: Objectives, seed: int = 0
) -> dict[str, Ratio]:
    """Every figure of `variant` over `baseline`'s.

    Rounds are drawn with replacement, both variants' slices of a round together: within a round the machine's
    noise is shared, between rounds it is not.
    """
    rounds = sorted({s.round for s in slices})
    by_round = {
        name: [observe([s for s in slices if s.variant == name and s.round == r], objectives) for r in rounds]
        for name in (variant, baseline)
    }

    def all_figures(chosen: Sequence[int]) -> FloatArray:
        above, below = (_pool([by_round[name][i] for i in chosen]) for name in (variant, baseline))
        with np.errstate(divide="ignore", invalid="ignore"):
            quotients: FloatArray = np.array([f(above) for f in FIGURES.values()]) / np.array(
                [f(below) for f in FIGURES.values()]
            )
        return quotients

    values = all_figures(range(len(rounds)))
    if len(rounds) < MIN_ROUNDS:
        return {name: Ratio(float(values[i]), math.nan, math.nan) for i, name in enumerate(FIGURES)}
    draw = np.random.default_rng(seed)
    drawn = np.array(
        [all_figures(draw.integers(len(rounds), size=len(rounds)).tolist()) for _ in range(RESAMPLES)]
    )
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    return {name: Ratio(float(values[i]), float(low[i]), float(high[i])) for i, name in enumerate(FIGURES)}


def _pool(parts: Sequence[Observed]) -> Observed:
    return Observed(
        requests=sum(p.requests for p in parts),
        good=sum(p.good for p in parts),
        errors=sum(p.errors for p in parts),
        tokens=sum(p.tokens for p in parts),
        seconds=sum(p.seconds for p in parts),
        ttft=[x for p in parts for x in p.ttft],
        itl=[x for p in parts for x in p.itl],
        total=[x for p in parts for x in p.total],
        state_bytes=[x for p in parts for x in p.state_bytes],
    )
