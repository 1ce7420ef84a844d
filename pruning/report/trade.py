"""Figures from pruning tables: what width costs, by method and layer."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from pruning.report.inputs import Reduction
from pruning.report.style import (
    DIGITS,
    RISES,
    SHADES,
    Figure,
    layer_indices,
    line,
    place,
    shades,
    short,
    single,
    spread,
    subplots,
)
from pruning.table import PER_LAYER, Cell, Curves, Table, groups


def tradeoff(name: str, table: Table, number: int) -> list[Figure]:
    """Rise in perplexity, and KL, against the width, per method with the range over seeds."""
    if not table.reduced:  # an interrupted sweep may have measured the dense model alone
        return []
    seeds = len({cell.seed for cell in table.reduced})
    around = (
        f"{name}: {table.checkpoint}, mean of {seeds} calibration seed{'s' * (seeds > 1)}, bars from the least to the "
        "largest. Dashed: the same total state, spent per layer."
    )
    dense = table.dense.perplexity
    rise = rises_by_width(table)
    kl = {
        row: {column: [c.kl for c in cells] for column, cells in columns.items()}
        for row, columns in groups(table).items()
    }
    return [
        Figure(
            f"perplexity-{number}",
            "Perplexity against width",
            f"{around} Dense: perplexity {dense:.3f} on {table.dense.tokens:,} held-out tokens.",
            _against_width(rise, "rise in perplexity, %"),
        ),
        Figure(
            f"methods-{number}",
            "Methods at each width",
            f"{around} The same rises, each width on a scale of its own.",
            _at_each_width(rise),
        ),
        Figure(
            f"kl-{number}",
            "KL divergence against width",
            f"{around} KL(dense || reduced) over the full vocabulary, {table.kl_tokens:,} held-out tokens.",
            _against_width(kl, "KL, nats per token"),
        ),
    ]


def _against_width(rows: Mapping[str, Mapping[int, Sequence[float]]], label: str) -> Any:
    figure = single(460)
    for row, columns in rows.items():
        means = [fmean(values) for values in columns.values()]
        figure.add_scatter(
            x=list(columns),
            y=means,
            name=short(row),
            error_y=spread(columns.values()),
            **_style(row, list(rows)),
        )
    widths = sorted({column for columns in rows.values() for column in columns})
    lowest = min(value for columns in rows.values() for values in columns.values() for value in values)
    figure.update_xaxes(title="d_k kept, mean over layers", type="log", tickvals=widths)
    # A rise of nothing has no logarithm.
    scale = {"type": "log", "tickvals": DIGITS} if lowest > 0 else {"type": "linear"}
    figure.update_yaxes(title=label, **scale)
    return figure


def _at_each_width(rows: Mapping[str, Mapping[int, Sequence[float]]]) -> Any:
    widths = sorted({column for columns in rows.values() for column in columns}, reverse=True)
    titles = [f"d_k {width}: rise, %" for width in widths]
    figure = subplots(titles, height=140 + 18 * len(rows), shared_yaxes=True, horizontal_spacing=0.05)
    for i, width in enumerate(widths):
        for row, columns in rows.items():
            if width in columns:
                figure.add_scatter(
                    x=[fmean(columns[width])],
                    y=[short(row)],
                    error_x=spread([columns[width]]),
                    showlegend=False,
                    **_style(row, list(rows)),
                    **place(i),
                )
        drawn = [value for columns in rows.values() for value in columns.get(width, ())]
        scale = {"type": "log", "tickvals": DIGITS} if min(drawn) > 0 else {"type": "linear"}
        figure.update_xaxes(**scale, **place(i))
    figure.update_yaxes(autorange="reversed")
    return figure


def ladder(tables: Sequence[tuple[str, Table]]) -> list[Figure]:
    """Rise in perplexity against the width, one line for each model, for every row that several tables have."""
    rises = [(name, table, rises_by_width(table)) for name, table in tables]
    rows = [
        row
        for row in dict.fromkeys(row for _, _, rise in rises for row in rise)
        if sum(row in rise for _, _, rise in rises) > 1
    ]
    if not rows:
        return []
    figure = subplots(rows, columns=3, height=320, horizontal_spacing=0.07)
    widths: set[int] = set()
    drawn: list[float] = []
    for i, (_, table, rise) in enumerate(rises):
        for panel, row in enumerate(rows):
            columns = rise.get(row, {})
            figure.add_scatter(
                x=list(columns),
                y=[fmean(values) for values in columns.values()],
                error_y=spread(columns.values()),
                name=f"{short(table.checkpoint)} ({table.dense.perplexity:.2f})",
                legendgroup=str(i),
                showlegend=panel == 0,
                **line(i),
                **place(panel, 3),
            )
            widths |= set(columns)
            drawn += (value for values in columns.values() for value in values)
    figure.update_xaxes(title="d_k kept", type="log", tickvals=sorted(widths))
    # Panels share their scale. A rise of nothing has no logarithm.
    if min(drawn) > 0:
        low, high = math.log10(min(drawn)), math.log10(max(drawn))
        figure.update_yaxes(type="log", tickvals=RISES, range=[low - 0.1, high + 0.1])
    else:
        figure.update_yaxes(range=[min(drawn), 1.05 * max(drawn)])
    figure.update_yaxes(title="rise in perplexity, %", col=1)
    return [
        Figure(
            "ladder",
            "Models against each other",
            "Rise in perplexity of each model against its own dense one, whose perplexity is in brackets; means over "
            "calibration seeds, bars from the least to the largest. "
            + "; ".join(f"{table.checkpoint}: {name}" for name, table, _ in rises)
            + ".",
            figure,
        )
    ]


def rises_by_width(table: Table) -> dict[str, dict[int, list[float]]]:
    """Row -> column -> the rise in perplexity against the dense model, in percent, of each seed."""
    dense = table.dense.perplexity
    return {
        row: {column: [100 * (c.perplexity / dense - 1) for c in cells] for column, cells in columns.items()}
        for row, columns in groups(table).items()
    }


def _style(row: str, rows: Sequence[str]) -> dict[str, Any]:
    """A method's colour and symbol, hollow and dashed where its budget is spent per layer."""
    method = row.removesuffix(PER_LAYER)
    methods = list(dict.fromkeys(r.removesuffix(PER_LAYER) for r in rows))
    style = line(methods.index(method), dash="solid" if row == method else "dash")
    if row != method:
        style["marker"] = {**style["marker"], "symbol": f"{style['marker']['symbol']}-open"}
    return style


def budgets(tables: Sequence[tuple[str, Table]], reductions: Sequence[tuple[str, Reduction]]) -> list[Figure]:
    """Measured error curves per layer, and the widths that were bought with them."""
    figures: list[Figure] = []
    for name, table in tables:
        for method in dict.fromkeys(curves.method for curves in table.curves):
            of_method = [curves for curves in table.curves if curves.method == method]
            curves = dict(
                zip(_layers(of_method[0]), _mean_curves([c.loss_rise for c in of_method]), strict=True)
            )
            chosen = {
                f"budget of d_k {column}": _mean_widths(cells)
                for column, cells in groups(table).get(f"{method}{PER_LAYER}", {}).items()
            }
            caption = (
                f"{name}: {method}, mean of {len(of_method)} calibration seed{'s' * (len(of_method) > 1)}."
            )
            figures.append(_budget(len(figures), caption, curves, chosen))
    for name, reduction in reductions:
        if reduction.budget is not None:
            caption = (
                f"{name}: {reduction.method}, seed {reduction.seed}, {reduction.budget.state_bytes:,} bytes."
            )
            chosen = {"chosen": [float(n) for n in reduction.d_k]}
            rises = reduction.budget.loss_rise
            curves = dict(zip(layer_indices(reduction.layers, len(rises)), rises, strict=True))
            figures.append(_budget(len(figures), caption, curves, chosen))
    return figures


def _layers(curves: Curves) -> list[int]:
    return layer_indices(curves.layers, len(curves.loss_rise))


def _mean_widths(cells: Sequence[Cell]) -> list[float]:
    return [fmean(widths) for widths in zip(*(cell.d_k for cell in cells), strict=True)]


def _mean_curves(measured: Sequence[Sequence[Mapping[int, float]]]) -> list[dict[int, float]]:
    """For each layer the mean of its curves over the seeds."""
    return [
        {width: fmean(curve[width] for curve in curves) for width in curves[0]}
        for curves in zip(*measured, strict=True)
    ]


def _budget(
    number: int,
    caption: str,
    curves: Mapping[int, Mapping[int, float]],
    chosen: Mapping[str, Sequence[float]],
) -> Figure:
    """Error curves by the index of their layer, and the widths of these layers that each budget bought."""
    figure = subplots(["rise in loss, layer reduced alone", "widths chosen"], height=400)
    colours = shades(len(curves))
    for colour, (layer, curve) in zip(colours, curves.items(), strict=True):
        widths = sorted(curve)
        figure.add_scatter(
            x=widths,
            y=[curve[n] for n in widths],
            name=f"layer {layer}",
            mode="lines",
            line={"color": colour, "width": 2},
            showlegend=len(curves) <= 12,
            **place(0),
        )
    if len(chosen) == 1:
        (bought,) = chosen.values()
        figure.add_scatter(
            x=list(bought),
            y=[curve.get(round(n)) for curve, n in zip(curves.values(), bought, strict=True)],
            mode="markers",
            showlegend=False,
            marker={"color": colours, "size": 11, "symbol": "circle-open", "line": {"width": 2}},
            **place(0),
        )
    for i, (label, of_layers) in enumerate(chosen.items()):
        figure.add_scatter(x=list(curves), y=list(of_layers), name=short(label), **line(i), **place(1))
    figure.update_xaxes(title="d_k kept", row=1, col=1)
    figure.update_yaxes(title="nats per token", row=1, col=1)
    ends = [min(curves) - 0.5, max(curves) + 0.5]
    figure.update_xaxes(title="layer", row=1, col=2, dtick=max(len(curves) // 12, 1), range=ends)
    figure.update_yaxes(title="d_k", row=1, col=2, rangemode="tozero")
    return Figure(
        f"budget-{number}",
        "Error budget per layer",
        f"{caption} Left: the rise in loss on calibration text when that layer alone keeps so many channels. "
        f"Right: the widths that the budget bought. {SHADES}",
        figure,
    )
