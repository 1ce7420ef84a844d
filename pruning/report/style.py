"""Lines, symbols and layout that all figures share."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from lowkey.page import COLOURS

SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "x",
    "star",
    "pentagon",
    "hexagon",
    "cross",
    "bowtie",
)
SCALE = "Viridis"
MARGIN = {"l": 56, "r": 16, "t": 32, "b": 48}
"""Pixels around the axes."""
RISES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
"""Ticks of a rise in perplexity on a logarithmic scale, in percent."""
DIGITS = tuple(digit * 10.0**power for power in range(-6, 5) for digit in (1, 2, 5))
"""Ticks of other logarithmic scales."""
SHADES = "The first layer is dark, the last one light."


@dataclass(frozen=True)
class Figure:
    """One figure with what stands around it."""

    name: str
    """The figure's name in files and links: lower case, digits and dashes."""
    title: str
    caption: str
    figure: Any
    """The drawing, a plotly.graph_objects.Figure."""


def subplots(titles: Sequence[str], *, columns: int = 2, height: int = 360, **options: Any) -> Any:
    """Empty axes for each title, `columns` beside each other, each row `height` high."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    options = {"horizontal_spacing": 0.11, "vertical_spacing": 0.32 / rows if rows > 1 else 0} | options
    figure = make_subplots(rows, columns, subplot_titles=[escape(t) for t in titles], **options)
    figure.update_layout(height=rows * height)
    figure.update_annotations(font_size=13)
    return figure


def place(index: int, columns: int = 2) -> dict[str, int]:
    """Row and column of the `index`-th of the subplots."""
    return {"row": index // columns + 1, "col": index % columns + 1}


def single(height: int = 420) -> Any:
    figure = go.Figure()
    figure.update_layout(height=height)
    return figure


def shades(count: int) -> list[str]:
    """`count` colours of the scale, without its ends, which a dark or a light page swallows."""
    steps = [0.25 + 0.6 * i / max(count - 1, 1) for i in range(count)]
    return [str(c) for c in sample_colorscale(SCALE, steps)]


def line(index: int, *, dash: str = "solid") -> dict[str, Any]:
    """Line and marker of the `index`-th series."""
    colour = COLOURS[index % len(COLOURS)]
    return {
        "mode": "lines+markers",
        "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"color": colour, "size": 8, "symbol": SYMBOLS[index % len(SYMBOLS)]},
    }


def spread(seeds: Iterable[Sequence[float]]) -> dict[str, Any]:
    """Bars from the least to the largest value, around the mean."""
    values = [list(v) for v in seeds]
    return {
        "symmetric": False,
        "array": [max(v) - fmean(v) for v in values],
        "arrayminus": [fmean(v) - min(v) for v in values],
        "thickness": 1.5,
        "width": 4,
    }


def short(name: str, length: int = 40) -> str:
    """A name for legends: the end of a long path, safe in plotly's markup."""
    return escape(name if len(name) <= length else f"...{name[3 - length :]}")


def head_ticks(heads: Mapping[int, int]) -> dict[str, Any]:
    """The y axis of a heat map with a row for each head: the name of each layer stands at its first head.

    Args:
        heads: How many heads each layer has, by its index.
    """
    starts = list(itertools.accumulate(heads.values(), initial=0))[:-1]
    step = -(-len(starts) // 24)
    return {
        "tickvals": starts[::step],
        "ticktext": [f"layer {i}" for i in heads][::step],
        "autorange": "reversed",
        "showgrid": False,
        "zeroline": False,
    }


def tokens_label(tokens: int) -> str:
    """A number of tokens on an axis of powers of two: `512`, `2k`."""
    return f"{tokens / 1024:.3g}k" if tokens >= 1024 else str(tokens)


def layer_indices(layers: Sequence[int] | None, count: int) -> list[int]:
    """The indices of the `count` layers that figures of a file are of: `layers`, or the first ones where it names none
    because all layers of its model are linear."""
    return list(range(count)) if layers is None else list(layers)


def rows_height(rows: int) -> int:
    """Height of a heat map with so many rows."""
    return min(max(140 + 14 * rows, 260), 1100)
