"""The A/B figures: what each variant did in a window of time, and how variants differ on the same prompts.

Everything is kept in rings of a fixed size: the oldest rows give way.
"""

import math
import time
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from server.wire.hub import EndedRequest, Pair, Shadowed, ShadowOutcome, Source

Rows = NDArray[np.float64]

MIN_PAIRS = 30
"""Fewest pairs that get an interval: from fewer, a bootstrap promises too much."""
RESAMPLES = 1000
CONFIDENCE = 0.95
PAIRS_KEPT = 2000
GAPS_PER_REQUEST = 10
MIN_SPEED_TOKENS = 16
"""Fewest tokens of a request whose own speed counts in the percentiles: that of a shorter one is mostly noise."""


class Ring:
    """The last `capacity` rows, `[time, *values]` in float64; times in seconds of time.time()."""

    def __init__(self, capacity: int, width: int) -> None:
        self._rows = np.empty((capacity, width + 1))
        self._count = 0

    def add(self, now: float, rows: ArrayLike) -> None:
        """Add rows `[rows, width]`, all of the same time."""
        values = np.asarray(rows, dtype=np.float64)
        places = np.arange(self._count, self._count + len(values)) % len(self._rows)
        # Of more rows than there are places, the last ones stay.
        self._rows[places[-len(self._rows) :], 0] = now
        self._rows[places[-len(self._rows) :], 1:] = values[-len(self._rows) :]
        self._count += len(values)

    def timed(self, start: float) -> Rows:
        """The rows from `start` on, `[rows, 1 + width]` with their times, in no particular order."""
        rows = self._rows[: self._count]
        return rows[rows[:, 0] >= start].copy()

    def since(self, start: float) -> Rows:
        """Values of the rows from `start` on, `[rows, width]`, in no particular order."""
        return self.timed(start)[:, 1:]

    def covers(self, start: float) -> bool:
        """Whether the ring still has everything from `start` on."""
        return self._count <= len(self._rows) or float(self._rows[:, 0].min()) < start


QUALITY_FIELDS = ("kl", "top1_agreement", "prompt_nll_difference")
PAIR_FIELDS = (*QUALITY_FIELDS, "speed_ratio", "ttft_difference_s")
OUTCOMES: tuple[ShadowOutcome, ...] = get_args(ShadowOutcome)


@dataclass
class _Traffic:
    requests: Ring
    gaps: Ring


@dataclass
class ABWindow:
    """The recent traffic of each variant, and the recent pairs of variants.

    Args:
        samples: requests that are remembered for each variant.
    """

    samples: int
    _traffic: dict[str, _Traffic] = field(default_factory=dict)
    _pairs: dict[tuple[str, str, Source], Ring] = field(default_factory=dict)
    _shadows: dict[tuple[str, str], Ring] = field(default_factory=dict)

    def add_request(self, request: EndedRequest) -> None:
        """Remember a request that has ended."""
        variant = request.variant
        traffic = self._traffic.get(variant)
        if traffic is None:
            traffic = _Traffic(Ring(self.samples, 4), Ring(self.samples * GAPS_PER_REQUEST, 1))
            self._traffic[variant] = traffic
        now = time.time()
        row = (
            float(request.completion_tokens),
            _or_nan(request.decode_s),
            _or_nan(request.ttft_s),
            float(request.failed),
        )
        traffic.requests.add(now, [row])
        traffic.gaps.add(now, np.array(request.gaps_s).reshape(-1, 1))

    def add_pair(self, pair: Pair) -> None:
        """Remember how two variants differed on one prompt."""
        names = pair.variant, pair.baseline, pair.source
        ring = self._pairs.setdefault(names, Ring(PAIRS_KEPT, len(PAIR_FIELDS) + 1))
        values = (_or_nan(getattr(pair, name)) for name in PAIR_FIELDS)
        ring.add(time.time(), [(*values, float(pair.tokens % 2**53))])

    def add_shadow(self, shadowed: Shadowed) -> None:
        """Remember what came of a request that a rule drew."""
        ring = self._shadows.setdefault((shadowed.variant, shadowed.baseline), Ring(self.samples, 1))
        ring.add(time.time(), [(float(OUTCOMES.index(shadowed.outcome)),)])

    def shadow(self, window_s: float) -> list[dict[str, Any]]:
        """How many requests of the last `window_s` seconds were to be repeated, by variants and by what came of it."""
        start = time.time() - window_s
        counts = {
            names: np.bincount(ring.since(start)[:, 0].astype(int), minlength=len(OUTCOMES))
            for names, ring in list(self._shadows.items())
        }
        return [
            {"variant": variant, "baseline": baseline, **dict(zip(OUTCOMES, found.tolist(), strict=True))}
            for (variant, baseline), found in counts.items()
        ]

    def timed_requests(self, variant: str, start: float) -> Rows:
        """Requests of a variant that ended from `start` on, `[requests, 5]`: time, tokens, seconds from the first to
        the last one, seconds to the first one, and 1 for those that failed. What one did not get to is NaN."""
        traffic = self._traffic.get(variant)
        return np.empty((0, 5)) if traffic is None else traffic.requests.timed(start)

    def timed_pairs(self, start: float) -> dict[tuple[str, str], Rows]:
        """By variant and baseline, their pairs from `start` on, the oldest first, `[pairs, 2 + fields]`: time,
        `PAIR_FIELDS`, and the hash of the tokens. What a pair does not tell is NaN, and of the same tokens only the
        first one tells of quality."""
        found: dict[tuple[str, str], list[Rows]] = {}
        for (variant, baseline, _), ring in list(self._pairs.items()):
            found.setdefault((variant, baseline), []).append(ring.timed(start))
        return {names: _once(np.concatenate(rings)) for names, rings in found.items()}

    def traffic(self, variant: str, window_s: float) -> dict[str, Any]:
        """What one variant did in the last `window_s` seconds. Percentiles are over requests, of `itl_s` over gaps."""
        start = time.time() - window_s
        traffic = self._traffic.get(variant)
        if traffic is None:
            requests, gaps, complete = np.empty((0, 4)), np.empty((0, 1)), True
        else:
            requests, gaps = traffic.requests.since(start), traffic.gaps.since(start)
            complete = traffic.requests.covers(start) and traffic.gaps.covers(start)
        return {
            "requests": len(requests),
            "errors": int(requests[:, 3].sum()),
            "completion_tokens": int(requests[:, 0].sum()),
            "tokens_per_second": _speeds(requests[:, 0], requests[:, 1]),
            "ttft_s": _percentiles(requests[:, 2]),
            "itl_s": _percentiles(gaps[:, 0]),
            "complete": complete,
        }

    def pairs(self, window_s: float) -> list[dict[str, Any]]:
        """How variants differed in the last `window_s` seconds, for each that was compared with a baseline. Takes a
        fraction of a second for full rings: not for an event loop."""
        start = time.time() - window_s
        counts: dict[tuple[str, str], dict[Source, int]] = {}
        for (variant, baseline, source), ring in list(self._pairs.items()):
            rows = len(ring.since(start))
            if rows:
                counts.setdefault((variant, baseline), {})[source] = rows
        timed = self.timed_pairs(start)
        return [_differences(*names, sources, timed[names]) for names, sources in counts.items()]


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else float(value)


_PERCENTILES = {"p50": 50, "p95": 95, "p99": 99}


def _percentiles(values: Rows) -> dict[str, float] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    return {"mean": float(values.mean()), **_quantiles(values)}


def _quantiles(values: Rows) -> dict[str, float]:
    return {name: float(np.percentile(values, percent)) for name, percent in _PERCENTILES.items()}


def mean_speed(tokens: Rows, decode_s: Rows) -> float | None:
    """All tokens after the first ones over all the time that they took; None where nothing was timed."""
    timed = decode_s > 0  # NaN is not
    return float((tokens[timed] - 1).sum() / decode_s[timed].sum()) if timed.any() else None


def _speeds(tokens: Rows, decode_s: Rows) -> dict[str, float | None] | None:
    """Tokens per second of requests: the mean is all tokens after the first ones over all the time that they took, so
    that a short request weighs little; percentiles are over requests of at least `MIN_SPEED_TOKENS`, null if there are
    none."""
    mean = mean_speed(tokens, decode_s)
    if mean is None:
        return None
    long = (decode_s > 0) & (tokens >= MIN_SPEED_TOKENS)
    speeds = (tokens[long] - 1) / decode_s[long]
    return {
        "mean": mean,
        **(_quantiles(speeds) if len(speeds) else dict.fromkeys(_PERCENTILES)),
    }


def bootstrap_mean(values: Rows, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean (Efron and Tibshirani 1993, chapter 13), `CONFIDENCE` two-sided, from
    `RESAMPLES` resamples. The same values give the same interval."""
    rng = np.random.default_rng(seed)
    means = np.array([rng.choice(values, len(values)).mean() for _ in range(RESAMPLES)])
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def _estimate(values: Rows) -> dict[str, Any] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = bootstrap_mean(values) if len(values) >= MIN_PAIRS else (None, None)
    return {"mean": float(values.mean()), "low": low, "high": high, "pairs": len(values)}


def _estimate_ratio(values: Rows) -> dict[str, Any] | None:
    """The geometric mean: the arithmetic one of noisy ratios is over 1 for two variants of the same speed, whichever
    of them is divided by the other."""
    found = _estimate(np.log(values))
    if found is not None:
        found |= {name: math.exp(found[name]) for name in ("mean", "low", "high") if found[name] is not None}
    return found


def _once(rows: Rows) -> Rows:
    """Timed rows of pairs, the oldest first. What those of the same tokens say of quality counts once: it is NaN in all
    but the first of them."""
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    repeated = np.ones(len(rows), bool)
    repeated[np.unique(rows[:, -1], return_index=True)[1]] = False
    rows[repeated, 1 : 1 + len(QUALITY_FIELDS)] = np.nan
    return rows


def _differences(variant: str, baseline: str, counts: dict[Source, int], rows: Rows) -> dict[str, Any]:
    figures = {
        name: (_estimate_ratio if name == "speed_ratio" else _estimate)(rows[:, 1 + i])
        for i, name in enumerate(PAIR_FIELDS)
    }
    return {
        "variant": variant,
        "baseline": baseline,
        "pairs": counts,
        **figures,
        "verdict": _verdict(variant, baseline, len(np.unique(rows[:, -1])), figures),
    }


def _verdict(variant: str, baseline: str, pairs: int, figures: dict[str, dict[str, Any] | None]) -> str:
    if pairs < MIN_PAIRS:
        return f"too little data: {pairs} different pairs of {variant} and {baseline}, at least {MIN_PAIRS} are needed"
    words = [_quality(baseline, variant, figures["prompt_nll_difference"])]
    kl, agreement, speed = (figures[name] for name in ("kl", "top1_agreement", "speed_ratio"))
    if kl is not None and agreement is not None:
        words.append(f"KL {kl['mean']:.3g} [{kl['low']:.3g}, {kl['high']:.3g}] nats per token")
        words.append(f"the same likeliest token for {agreement['mean']:.1%}")
    if speed is None or speed["pairs"] < MIN_PAIRS:
        timed = 0 if speed is None else speed["pairs"]
        words.append(f"too little data on speed: {timed} timed pairs of at least {MIN_PAIRS}")
    else:
        words.append(f"{speed['mean']:.2f}x [{speed['low']:.2f}, {speed['high']:.2f}] the tokens/s")
    return "; ".join(words)


def _quality(baseline: str, variant: str, nll: dict[str, Any] | None) -> str:
    if nll is None or nll["pairs"] < MIN_PAIRS:
        return f"too little data on the likelihood of prompts under {variant} and {baseline}"
    if nll["low"] > 0:
        words = f"{variant} finds the prompts less likely than {baseline}"
    elif nll["high"] < 0:
        words = f"{variant} finds the prompts more likely than {baseline}"
    else:
        words = f"{variant} and {baseline} can't be told apart by the likelihood of the prompts"
    return f"{words} ({nll['mean']:+.3g} [{nll['low']:+.3g}, {nll['high']:+.3g}] nats per token)"
