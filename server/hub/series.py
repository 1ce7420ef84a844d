"""The A/B figures over time: a window cut into equal parts."""

import time
from typing import Any

import numpy as np

from server.hub.window import MIN_PAIRS, PAIR_FIELDS, ABWindow, Rows, mean_speed

Z = 1.959963984540054
"""Standard errors to each side of a mean in a 95 % interval."""


def series(window: ABWindow, variants: list[str], window_s: float, points: int) -> dict[str, Any]:
    """Figures of `points` parts of `window_s / points` seconds each, the last of them still going on.

    Parts begin at whole multiples of their length since 1970, so that two looks have the same parts. Of pairs of the
    same tokens the first in the window counts for quality; once it has left, the next one counts, in a later part.
    """
    step = window_s / points
    first = (time.time() // step - points + 1) * step

    def places(rows: Rows) -> Rows:
        return np.floor((rows[:, 0] - first) / step).astype(int).clip(0, points - 1)

    traffic = {name: window.timed_requests(name, first) for name in variants}
    pairs = window.timed_pairs(first)
    return {
        "step_s": step,
        "starts": [first + i * step for i in range(points)],
        "variants": {name: _traffic(rows, places(rows), points) for name, rows in traffic.items()},
        "pairs": [
            {"variant": variant, "baseline": baseline, **_pairs(rows, places(rows), points)}
            for (variant, baseline), rows in pairs.items()
        ],
    }


def _traffic(rows: Rows, places: Rows, points: int) -> dict[str, list[Any]]:
    parts = [rows[places == i] for i in range(points)]
    return {
        "requests": [len(part) for part in parts],
        "errors": [int(part[:, 4].sum()) for part in parts],
        "tokens_per_second": [mean_speed(part[:, 1], part[:, 2]) for part in parts],
        "ttft_s": [_mean(part[:, 3]) for part in parts],
    }


def _pairs(rows: Rows, places: Rows, points: int) -> dict[str, Any]:
    """By figure, the mean of each part, and what was known at its end: of all pairs of the window until then. Means of
    `speed_ratio` are geometric ones."""
    parts: dict[str, list[float | None]] = {}
    so_far: dict[str, list[dict[str, Any] | None]] = {}
    for i, name in enumerate(PAIR_FIELDS):
        values = rows[:, 1 + i]
        known = np.isfinite(values)
        values, at = values[known], places[known]
        if name == "speed_ratio":
            values = np.log(values)
        parts[name] = [_mean(values[at == part]) for part in range(points)]
        so_far[name] = [_interval(values[at <= part]) for part in range(points)]
        if name == "speed_ratio":
            parts[name] = [None if mean is None else float(np.exp(mean)) for mean in parts[name]]
            so_far[name] = [found and _exp(found) for found in so_far[name]]
    return {"parts": parts, "so_far": so_far}


def _interval(values: Rows) -> dict[str, Any] | None:
    """A mean and its 95 % interval by standard errors: bootstraps of so many parts would take seconds."""
    if not len(values):
        return None
    mean, half = float(values.mean()), None
    if len(values) >= MIN_PAIRS:
        half = Z * float(values.std(ddof=1)) / len(values) ** 0.5
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return {"mean": mean, "low": low, "high": high, "pairs": len(values)}


def _exp(found: dict[str, Any]) -> dict[str, Any]:
    """The same of the values whose logarithms these are of."""
    ends = {
        name: None if found[name] is None else float(np.exp(found[name])) for name in ("mean", "low", "high")
    }
    return {**found, **ends}


def _mean(values: Rows) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None
