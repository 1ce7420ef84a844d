"""The plots of the HTML report."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from loadtest.figures import FIGURES, Objectives, Slice, observe
from loadtest.run import Probe
from lowkey.page import COLOURS

LIMIT = {"line_dash": "dot", "line_color": "#7a8594"}
MS = {
    "title": "ms",
    "type": "log",
    "tickvals": [digit * 10.0**power for power in range(-2, 6) for digit in (1, 2, 5)],
}
"""A logarithmic axis in ms, with ticks from 10 us to minutes."""
POINTS = 400
"""How many points a curve has at the most."""


@dataclass(frozen=True)
class Plot:
    """One plot of the page."""

    name: str
    """The id of the page's element that it is drawn into."""
    title: str
    figure: Any
    """The drawing, a plotly.graph_objects.Figure without a height, which the page decides."""


def _curve(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """An empirical distribution, in ms and as a share."""
    at = np.linspace(0, 1, min(len(values), POINTS))
    return (1e3 * np.quantile(values, at)).tolist(), at.tolist()


def _named(variant: str, colour: str) -> dict[str, Any]:
    # Plotly reads some HTML in names, but not the entities of quotes.
    return {"name": escape(variant, quote=False), "line": {"color": colour}}


def paired(slices: Sequence[Slice], variants: Sequence[str], objectives: Objectives) -> list[Plot]:
    """Distributions of latencies, and tokens/s round by round."""
    ttft, itl, total, speed = (go.Figure() for _ in range(4))
    for variant, colour in zip(variants, COLOURS, strict=False):
        mine = [s for s in slices if s.variant == variant]
        seen = observe(mine, objectives)
        style = _named(variant, colour)
        for figure, values in ((ttft, seen.ttft), (itl, seen.itl), (total, seen.total)):
            if values:
                x, y = _curve(values)
                figure.add_scatter(x=x, y=y, mode="lines", **style)
        rounds = [observe([s], objectives) for s in mine]
        speed.add_scatter(
            x=[s.round + 1 for s in mine],
            y=[s.tokens / s.seconds for s in rounds],
            mode="lines+markers",
            **style,
        )
    for figure, share in ((ttft, "share of requests"), (itl, "share of gaps"), (total, "share of requests")):
        figure.update_xaxes(**MS)
        figure.update_yaxes(title=share)
    speed.update_xaxes(title="round", dtick=max(1, len({s.round for s in slices}) // 10))
    speed.update_yaxes(title="tokens/s", rangemode="tozero")
    return [
        Plot("ttft", "Time to first token", ttft),
        Plot("itl", "Inter-token latency", itl),
        Plot("total", "End to end", total),
        Plot("speed", "Tokens per second by round", speed),
    ]


def sweep(probes: Sequence[Probe], objectives: Objectives, attain: float) -> list[Plot]:
    """What became of each rate that was tried."""
    share, tail = go.Figure(), go.Figure()
    for variant, colour in zip(dict.fromkeys(p.variant for p in probes), COLOURS, strict=False):
        mine = sorted((p for p in probes if p.variant == variant), key=lambda p: p.rate)
        style: dict[str, Any] = {
            "x": [p.rate for p in mine],
            "mode": "lines+markers",
            "marker": {"symbol": ["circle" if p.held else "x" for p in mine], "size": 9},
            **_named(variant, colour),
        }
        share.add_scatter(y=[p.share for p in mine], **style)
        tail.add_scatter(
            y=[1e3 * FIGURES["ttft_p95_s"](observe([p.slice], objectives)) for p in mine], **style
        )
    share.add_hline(y=attain, **LIMIT)
    tail.add_hline(y=1e3 * objectives.ttft_s, **LIMIT)
    for figure in (share, tail):
        figure.update_xaxes(title="requests/s")
    share.update_yaxes(title="share")
    tail.update_yaxes(**MS)
    return [
        Plot("share", "Requests within the objectives", share),
        Plot("tail", "Time to first token, p95", tail),
    ]
