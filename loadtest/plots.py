"""The plots of the HTML report."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from loadtest.figures import FIGURES, Objectives, Slice, observe
from loadtest.run import Probe
from lowkey.page import COLOURS

LIMIT = {"line_dash": "dot", "line_color": "#7a8594"}
POINTS = 400
"""How many points a curve has at the most."""


@dataclass(frozen=True)
class Plot:
    """One plot of the page."""

    name: str
    """The id of the page's element that it is drawn into."""
    title: str
    caption: str
    """How to read it."""
    figure: Any
    """The drawing, a plotly.graph_objects.Figure without a height, which the page decides."""


def _curve(values: Sequence[float]) -> tuple[list[float], list[float]]:
    """An empirical distribution, in ms and as a share."""
    at = np.linspace(0, 1, min(len(values), POINTS))
    return (1e3 * np.quantile(values, at)).tolist(), at.tolist()


def _milliseconds(values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis in ms for values in ms, with ticks that a narrow screen has room for."""
    drawn = [value for value in values if value > 0]
    wide = bool(drawn) and max(drawn) / min(drawn) > 100
    digits = (1,) if wide else (1, 2, 5)
    ticks = [digit * 10.0**power for power in range(-3, 7) for digit in digits]
    return {"title": "ms", "type": "log", "tickvals": ticks, "ticktext": [f"{tick:,g}" for tick in ticks]}


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
        figure.update_xaxes(**_milliseconds(x for line in figure.data for x in line.x))
        figure.update_yaxes(title=share, tickformat=".0%")
    speed.update_xaxes(title="round", dtick=max(1, len({s.round for s in slices}) // 10))
    speed.update_yaxes(title="tokens/s", rangemode="tozero")
    return [
        Plot(
            "ttft",
            "Time to first token",
            "From when a request was due to its first piece of text. A point of a line: that share of the requests "
            "took at most so long. Further left is faster; 50 % is the table's median, 95 % its p95.",
            ttft,
        ),
        Plot(
            "itl",
            "Inter-token latency",
            "The gaps between pieces of text, of all requests together, read the same way. Gaps near zero are pieces "
            "that lay together when the client came to read; the longest are those in which the server worked on "
            "other requests' prompts.",
            itl,
        ),
        Plot(
            "total",
            "End to end",
            "From when a request was due to its last token, read the same way. Long answers take longer, and both "
            "variants got the same lengths.",
            total,
        ),
        Plot(
            "speed",
            "Tokens per second by round",
            "All tokens of a round over its seconds; higher is faster. Variants take turns within a round, so what "
            "moves both lines is the machine, and what is between them is the variant.",
            speed,
        ),
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
    share.update_yaxes(title="share", tickformat=".0%")
    tail.update_yaxes(**_milliseconds(y for line in tail.data for y in line.y))
    return [
        Plot(
            "share",
            "Requests within the objectives",
            "A mark for each rate that was tried: a disc where it was held, a cross where not. The dotted line is "
            f"what has to be reached, {attain:.0%}. The further right a variant stays above it, the more it can take.",
            share,
        ),
        Plot(
            "tail",
            "Time to first token, p95",
            "Of the same rates: 95 % of the requests had their first token in so long. It rises steeply where requests "
            f"come faster than they are served. The dotted line is the objective, {1e3 * objectives.ttft_s:g} ms.",
            tail,
        ),
    ]
