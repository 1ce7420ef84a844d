"""What is left of a test: JSON with every request, tables in Markdown, and a page of plots that needs no network."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loadtest.figures import FIGURES, Objectives, Ratio, Slice, observe, ratios
from loadtest.run import Probe, Search

LABELS = {
    "tokens_per_second": "tokens/s",
    "goodput_per_second": "goodput, requests/s",
    "ttft_p50_s": "TTFT median, ms",
    "ttft_p95_s": "TTFT p95, ms",
    "ttft_p99_s": "TTFT p99, ms",
    "itl_p50_s": "ITL median, ms",
    "itl_p95_s": "ITL p95, ms",
    "itl_p99_s": "ITL p99, ms",
    "total_p50_s": "end to end median, ms",
    "total_p95_s": "end to end p95, ms",
    "total_p99_s": "end to end p99, ms",
    "state_bytes": "state bytes per request",
}
COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518", "#72b7b2")
WIDTH = 1100
"""Of a page's figure, in pixels."""

POINTS = 400
"""Of a curve."""


def clean(value: Any) -> Any:
    """NaN is not JSON."""
    if isinstance(value, dict):
        return {key: clean(v) for key, v in value.items()}
    if isinstance(value, list):
        return [clean(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe(slices: Sequence[Slice], variants: Sequence[str], objectives: Objectives) -> dict[str, Any]:
    """Figures of each variant, and each one's ratios to the first."""
    answer: dict[str, Any] = {"variants": {}, "ratios": {}}
    for variant in variants:
        mine = [s for s in slices if s.variant == variant]
        seen = observe(mine, objectives)
        lags = [r.lag_s for s in mine for r in s.results]
        answer["variants"][variant] = {
            "requests": seen.requests,
            "errors": seen.errors,
            "good": seen.good,
            "seconds": seen.seconds,
            "client_lag_p99_s": float(np.quantile(lags, 0.99)) if lags else math.nan,
            **{name: figure(seen) for name, figure in FIGURES.items()},
        }
    for variant in variants[1:]:
        of = ratios(slices, variant, variants[0], objectives)
        answer["ratios"][f"{variant}/{variants[0]}"] = {name: asdict(ratio) for name, ratio in of.items()}
    return answer


def requests_of(slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """Every request, times in seconds from when it was due."""
    return [
        {
            "variant": s.variant,
            "round": s.round,
            "lag_s": r.lag_s,
            "tokens": r.tokens,
            "state_bytes": r.state_bytes,
            "error": r.error,
            "total_s": r.ended - r.sent,
            "token_s": [round(t - r.sent, 6) for t in r.token_times],
        }
        for s in slices
        for r in s.results
    ]


def _cell(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if name == "state_bytes":
        return f"{value:,.0f}"
    return f"{1e3 * value:.1f}" if name.endswith("_s") else f"{value:.2f}"


def table(described: dict[str, Any]) -> list[list[str]]:
    """Header and rows: each figure of each variant, then the ratios with their intervals."""
    variants, quotients = described["variants"], described["ratios"]
    rows = [["", *variants, *quotients]]
    for name, label in (("requests", "requests"), ("errors", "errors")):
        rows.append([label, *(str(v[name]) for v in variants.values()), *("" for _ in quotients)])
    for name, label in LABELS.items():
        cells = [_cell(name, v[name]) for v in variants.values()]
        for of in quotients.values():
            ratio = Ratio(**of[name])
            good = math.isfinite(ratio.value)
            cells.append(f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})" if good else "-")
        rows.append([label, *cells])
    return rows


def sweep_table(searches: dict[str, Search]) -> list[list[str]]:
    """Header and rows: what each variant holds, and the ratio to the first."""
    first = next(iter(searches.values()))
    rows = [["", "holds, requests/s", "does not hold", "ratio"]]
    for variant, search in searches.items():
        high = "-" if search.high is None else f"{search.high:.2f}"
        ratio = f"{search.low / first.low:.2f}" if first.low else "-"
        rows.append([variant, f"{search.low:.2f}", high, ratio])
    return rows


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]]) + "\n"


def _curve(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """An empirical distribution, in ms and as a share."""
    at = np.linspace(0, 1, min(len(values), POINTS))
    return (1e3 * np.quantile(values, at)).tolist(), at.tolist()


def plot_paired(slices: Sequence[Slice], variants: Sequence[str], objectives: Objectives) -> go.Figure:
    """Distributions of latencies, and tokens/s round by round."""
    titles = ("Time to first token", "Inter-token latency", "End to end", "Tokens per second by round")
    figure = make_subplots(rows=2, cols=2, subplot_titles=titles, vertical_spacing=0.16)
    for variant, colour in zip(variants, COLOURS, strict=False):
        mine = [s for s in slices if s.variant == variant]
        seen = observe(mine, objectives)
        line = {"name": variant, "legendgroup": variant, "line": {"color": colour}}
        for place, values in enumerate((seen.ttft, seen.itl, seen.total)):
            if values:
                x, y = _curve(values)
                trace = go.Scatter(x=x, y=y, mode="lines", showlegend=place == 0, **line)
                figure.add_trace(trace, row=place // 2 + 1, col=place % 2 + 1)
        speed = [observe([s], objectives) for s in mine]
        figure.add_trace(
            go.Scatter(
                x=[s.round + 1 for s in mine],
                y=[s.tokens / s.seconds for s in speed],
                mode="lines+markers",
                showlegend=False,
                **line,
            ),
            row=2,
            col=2,
        )
    for row, col in ((1, 1), (1, 2), (2, 1)):
        figure.update_xaxes(title="ms", type="log", dtick="D2", row=row, col=col)
        figure.update_yaxes(title="share of requests" if col == 1 else "share of gaps", row=row, col=col)
    figure.update_xaxes(title="round", dtick=1, row=2, col=2)
    figure.update_yaxes(rangemode="tozero", row=2, col=2)
    return figure.update_layout(height=720)


def plot_sweep(probes: Sequence[Probe], objectives: Objectives, attain: float) -> go.Figure:
    """What became of each rate that was tried."""
    titles = ("Requests within the objectives", "Time to first token, p95")
    figure = make_subplots(rows=1, cols=2, subplot_titles=titles)
    for variant, colour in zip(dict.fromkeys(p.variant for p in probes), COLOURS, strict=False):
        mine = sorted((p for p in probes if p.variant == variant), key=lambda p: p.rate)
        style: dict[str, Any] = {
            "x": [p.rate for p in mine],
            "mode": "lines+markers",
            "name": variant,
            "line": {"color": colour},
            "marker": {"symbol": ["circle" if p.held else "x" for p in mine], "size": 9},
        }
        figure.add_trace(go.Scatter(y=[p.share for p in mine], **style), row=1, col=1)
        tails = [1e3 * FIGURES["ttft_p95_s"](observe([p.slice], objectives)) for p in mine]
        figure.add_trace(go.Scatter(y=tails, showlegend=False, **style), row=1, col=2)
    figure.add_hline(y=attain, line_dash="dot", row=1, col=1)
    figure.add_hline(y=1e3 * objectives.ttft_s, line_dash="dot", row=1, col=2)
    figure.update_xaxes(title="requests/s")
    figure.update_yaxes(title="share", row=1, col=1)
    figure.update_yaxes(title="ms", type="log", dtick="D2", row=1, col=2)
    return figure.update_layout(height=440)


def write(directory: Path, data: dict[str, Any], tables: str, figure: go.Figure, title: str) -> None:
    """`loadtest.json`, `loadtest.md` and `loadtest.html` (with plotly in it), each whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    figure.update_layout(title=title, template="plotly_white", width=WIDTH)
    texts = {
        "loadtest.json": json.dumps(clean(data), allow_nan=False),
        "loadtest.md": tables,
        "loadtest.html": figure.to_html(config={"displayModeBar": False}),
    }
    for name, text in texts.items():
        temporary = directory / f".{name}"
        temporary.write_text(text, "utf-8")
        temporary.replace(directory / name)
