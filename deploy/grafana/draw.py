"""Draw the dashboard's panels from what a running Prometheus has.

This is not Grafana: queries, legends and layout are the dashboard's, the drawing is plotly's.

    python deploy/grafana/draw.py http://127.0.0.1:9090 dashboard.png --minutes 10     # needs plotly and Chromium

Prints one JSON object: row and panel -> for each of its queries, the label sets that had a finite value in that time.
"""

import argparse
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import plotly.graph_objects as go

from pruning.report.png import screenshot

DASHBOARD = Path(__file__).parent / "lowkey.json"
COLOURS = ("#4c78a8", "#e45756", "#54a24b", "#b279a2", "#f58518", "#72b7b2", "#9d755d", "#bab0ac")
WIDTH, ROW = 1500, 34
"""Pixels of the picture, and of a unit of Grafana's grid in height."""

FORMATS = {"s": {"ticksuffix": " s"}, "percentunit": {"tickformat": ".0%"}, "bytes": {"ticksuffix": "B"}}
STEP_S = 5


Series = list[tuple[dict[str, str], list[list[Any]]]]
"""Labels, and pairs of time and value."""


class Prometheus:
    """Questions about the last `minutes`, with Grafana's variables replaced as it does when "All" is chosen."""

    def __init__(self, url: str, minutes: float, interval: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/api/v1", timeout=30, trust_env=False)
        self._seconds = 60 * minutes
        self._variables = {"$__rate_interval": interval, "$__range": f"{math.ceil(self._seconds)}s"}
        for name in ("job", "variant"):
            values = self._get(f"/label/{name}/values", **{"match[]": "lowkey_variant_info"})
            self._variables[f"${name}"] = "|".join(values)

    def _get(self, path: str, **parameters: Any) -> Any:
        answer = self._http.get(path, params=parameters).json()
        if answer["status"] != "success":
            raise SystemExit(f"error: {parameters}: {answer['error']}")
        return answer["data"]

    def ask(self, expr: str) -> Series:
        """The series that had a finite value."""
        for variable, value in self._variables.items():
            expr = expr.replace(variable, value)
        now = time.time()
        data = self._get("/query_range", query=expr, start=now - self._seconds, end=now, step=STEP_S)
        found = [(s["metric"], [[t, float(v)] for t, v in s["values"]]) for s in data["result"]]
        return [(labels, values) for labels, values in found if any(math.isfinite(v) for _, v in values)]


def legend(template: str, labels: dict[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda m: labels.get(m[1], ""), template)


class Picture:
    """A figure with panels where Grafana's grid has them."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.figure = go.Figure()
        self.figure.update_layout(
            width=WIDTH,
            height=rows * ROW,
            template="plotly_white",
            showlegend=False,
            margin=dict.fromkeys("lrtb", 10),
        )

    def place(self, grid: dict[str, int]) -> tuple[list[float], list[float]]:
        """The panel's x and y domain."""
        left, top = grid["x"] / 24, 1 - grid["y"] / self.rows
        return [left, left + grid["w"] / 24], [top - grid["h"] / self.rows, top]

    def text(self, text: str, x: float, y: float, size: int) -> None:
        self.figure.add_annotation(
            text=text, x=x, y=y, xref="paper", yref="paper", xanchor="left", align="left", yanchor="top",
            showarrow=False, font={"size": size},
        )  # fmt: skip

    def stat(self, grid: dict[str, int], series: list[tuple[str, float]], unit: str) -> None:
        x, y = self.place(grid)
        for i, (name, value) in enumerate(series):
            width = (x[1] - x[0]) / len(series)
            suffix, form = ("B", ".3s") if unit == "bytes" else ("", ".3~g")
            self.figure.add_trace(
                go.Indicator(
                    value=value,
                    title={"text": name.replace(" against ", "<br>against "), "font": {"size": 11}},
                    number={
                        "font": {"size": 24, "color": COLOURS[i % len(COLOURS)]},
                        "suffix": suffix,
                        "valueformat": form,
                    },
                    domain={
                        "x": [x[0] + i * width, x[0] + (i + 1) * width],
                        "y": [y[0] + 0.005, y[1] - 0.025],
                    },
                )
            )

    def graph(
        self, number: int, grid: dict[str, int], series: list[tuple[str, list[list[Any]]]], unit: str
    ) -> None:
        x, y = self.place(grid)
        axes = {"xaxis": f"x{number}", "yaxis": f"y{number}"}
        for i, (name, values) in enumerate(series):
            times = [1000 * t for t, _ in values]
            line = {"color": COLOURS[i % len(COLOURS)], "width": 1.6}
            self.figure.add_scatter(
                x=times, y=[v for _, v in values], mode="lines", line=line, name=name, **axes
            )
        seen = [(i, name) for i, (name, values) in enumerate(series) if any(v for _, v in values)]
        names = [f'<span style="color:{COLOURS[i % len(COLOURS)]}">{name}</span>' for i, name in seen]
        lines = [" &nbsp;".join(names[i : i + 5]) for i in range(0, len(names), 5)]
        self.text("<br>".join(lines) or "all zero", x[0] + 0.008, y[0] + 0.019, 10)
        across = {"domain": [x[0] + 0.035, x[1] - 0.01], "anchor": f"y{number}"}
        along = {"domain": [y[0] + 0.035, y[1] - 0.022], "anchor": f"x{number}", "rangemode": "tozero"}
        self.figure.update_layout(
            {
                f"xaxis{number}": across | {"type": "date", "tickformat": "%H:%M:%S", "nticks": 6},
                f"yaxis{number}": along | FORMATS.get(unit, {}),
            }
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prometheus")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--interval", default="1m", help="what $__rate_interval stands for")
    options = parser.parse_args()
    panels = json.loads(DASHBOARD.read_text())["panels"]
    prometheus = Prometheus(options.prometheus, options.minutes, options.interval)
    picture = Picture(max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in panels))
    found: dict[str, list[list[dict[str, str]]]] = {}
    row = ""
    for number, panel in enumerate(panels, 2):
        grid = panel["gridPos"]
        x, y = picture.place(grid)
        picture.text(
            f"<b>{panel['title']}</b>", x[0] + 0.004, y[1] - 0.004, 15 if panel["type"] == "row" else 13
        )
        if panel["type"] == "row":
            row = panel["title"]
            continue
        unit = panel["fieldConfig"]["defaults"]["unit"]
        answers = [prometheus.ask(target["expr"]) for target in panel["targets"]]
        found[f"{row}: {panel['title']}"] = [[labels for labels, _ in answer] for answer in answers]
        series = [
            (legend(target["legendFormat"], labels), values)
            for target, answer in zip(panel["targets"], answers, strict=True)
            for labels, values in answer
        ]
        if panel["type"] == "stat":
            latest = [
                (name, next(v for _, v in reversed(values) if math.isfinite(v))) for name, values in series
            ]
            picture.stat(grid, latest, unit)
        else:
            picture.graph(number, grid, series, unit)
    html = options.picture.with_suffix(".html").resolve()
    html.write_text(picture.figure.to_html(config={"displayModeBar": False}), "utf-8")
    screenshot(html, options.picture.resolve(), WIDTH + 16, picture.rows * ROW + 16)
    html.unlink()
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
