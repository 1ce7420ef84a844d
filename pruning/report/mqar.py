"""Figures of models that were trained for associative recall: what width and bits of the state cost it."""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from lowkey.words import counted
from pruning.mqar_table import Accuracy, MQARTable, Recalled
from pruning.report.style import Figure, line, place, shades, spread, subplots

TRAINED = ", trained on"
"""What the name of a method has behind it where models were trained on after the reduction."""
INT8 = "int8"

Accuracies = dict[int, list[Accuracy]]
"""By number of pairs, one of each calibration seed."""


def curves(table: MQARTable, state_dtype: str = "float32") -> dict[str, dict[int, Accuracies]]:
    """Row -> width -> accuracies, widest first; the dense model's are in the rows of all methods."""
    found: dict[str, dict[int, Accuracies]] = {}
    dense = {r.trained: r for r in table.recalled if r.method is None and r.state_dtype == state_dtype}
    for r in table.recalled:
        if r.method is None or r.state_dtype != state_dtype:
            continue
        widths = found.setdefault(f"{r.method}{TRAINED * r.trained}", {})
        if not widths and r.trained in dense:
            _add(widths, dense[r.trained])
        _add(widths, r)
    if not found and False in dense:
        _add(found.setdefault("dense", {}), dense[False])
    return {row: dict(sorted(widths.items(), reverse=True)) for row, widths in found.items()}


def _add(widths: dict[int, Accuracies], recalled: Recalled) -> None:
    by_pairs = widths.setdefault(recalled.d_k, {})
    for accuracy in recalled.accuracy:
        by_pairs.setdefault(accuracy.pairs, []).append(accuracy)


def recall_by_width(name: str, table: MQARTable, number: int) -> list[Figure]:
    """Accuracy against the number of pairs, a line for each width; and against the width, a line for each method."""
    rows = curves(table)
    asked = [accuracy.queries for r in table.recalled for accuracy in r.accuracy]
    if not rows or not asked:
        return []
    queries = min(asked)
    seeds = len({r.seed for r in table.recalled})
    around = (
        f"{name}: {table.checkpoint}; share of queries where the value is the most likely token, {queries:,} queries "
        f"or more for each number of pairs, mean of {counted(seeds, 'calibration seed')}. Bars are the range over "
        "seeds, and of a single seed two standard errors."
    )
    return [
        Figure(
            f"mqar-{number}",
            "Recall by number of pairs and width",
            f"{around} Lines: states in float32. Rings: the same in int8, rounded after every token.",
            _by_pairs(rows, curves(table, INT8)),
        ),
        Figure(
            f"mqar-methods-{number}",
            "Recall by width and method",
            f"{around} States in float32.",
            _by_method(rows),
        ),
    ]


def _by_pairs(
    rows: Mapping[str, Mapping[int, Accuracies]], int8: Mapping[str, Mapping[int, Accuracies]]
) -> Any:
    figure = subplots(list(rows), height=330)
    widths = sorted({width for by_width in rows.values() for width in by_width}, reverse=True)
    colours = dict(zip(widths, shades(len(widths)), strict=True))
    named: set[int] = set()
    for panel, (row, by_width) in enumerate(rows.items()):
        for width, by_pairs in by_width.items():
            figure.add_scatter(
                x=list(by_pairs),
                y=_means(by_pairs.values()),
                error_y=_bars(by_pairs.values()),
                name=f"d_k {width}",
                mode="lines+markers",
                line={"color": colours[width], "width": 2},
                marker={"size": 5},
                legendgroup=str(width),
                showlegend=width not in named,
                **place(panel),
            )
            named.add(width)
            rounded = int8.get(row, {}).get(width, {})
            figure.add_scatter(
                x=list(rounded),
                y=_means(rounded.values()),
                mode="markers",
                marker={"color": colours[width], "size": 11, "symbol": "circle-open", "line": {"width": 1.5}},
                hovertemplate=f"d_k {width}, int8: %{{y:.1f}} %<extra></extra>",
                legendgroup=str(width),
                showlegend=False,
                **place(panel),
            )
    pairs = sorted({n for by_width in rows.values() for by_pairs in by_width.values() for n in by_pairs})
    figure.update_xaxes(title="key-value pairs", type="log", tickvals=pairs)
    figure.update_yaxes(title="right, %", range=[-3, 104])
    return figure


def _by_method(rows: Mapping[str, Mapping[int, Accuracies]]) -> Any:
    pairs = sorted({n for by_width in rows.values() for by_pairs in by_width.values() for n in by_pairs})
    figure = subplots([counted(n, "pair") for n in pairs], columns=3, height=300, horizontal_spacing=0.07)
    methods = list(dict.fromkeys(row.removesuffix(TRAINED) for row in rows))
    for panel, n in enumerate(pairs):
        for row, by_width in rows.items():
            method = row.removesuffix(TRAINED)
            measured = {width: by_pairs[n] for width, by_pairs in sorted(by_width.items()) if n in by_pairs}
            figure.add_scatter(
                x=list(measured),
                y=_means(measured.values()),
                error_y=_bars(measured.values()),
                name=row,
                legendgroup=row,
                showlegend=panel == 0,
                **line(methods.index(method), dash="solid" if row == method else "dash"),
                **place(panel, 3),
            )
    widths = sorted({width for by_width in rows.values() for width in by_width})
    figure.update_xaxes(title="d_k", type="log", tickvals=widths)
    figure.update_yaxes(range=[-3, 104])
    figure.update_yaxes(title="right, %", col=1)
    return figure


def _means(seeds: Iterable[Sequence[Accuracy]]) -> list[float]:
    return [100 * fmean(a.accuracy for a in accuracies) for accuracies in seeds]


def _bars(seeds: Iterable[Sequence[Accuracy]]) -> dict[str, Any]:
    """The range over seeds, or two standard errors where there is one seed."""
    values = []
    for accuracies in seeds:
        shares = [100 * a.accuracy for a in accuracies]
        if len(shares) == 1:
            error = 200 * accuracies[0].standard_error
            shares = [shares[0] - error, shares[0] + error]
        values.append(shares)
    return spread(values)


def recall_rows(table: MQARTable) -> tuple[list[str], list[list[str]]]:
    """Header and rows for people: accuracy in percent by number of pairs, with states in float32 and in int8."""
    full, rounded = curves(table), curves(table, INT8)
    pairs = sorted({a.pairs for r in table.recalled for a in r.accuracy})
    rows = [
        [
            f"{row}, d_k {width}",
            *(_cell(by_pairs.get(n), rounded.get(row, {}).get(width, {}).get(n)) for n in pairs),
        ]
        for row, by_width in full.items()
        for width, by_pairs in by_width.items()
    ]
    return ["", *map(str, pairs)], rows


def _cell(full: Sequence[Accuracy] | None, rounded: Sequence[Accuracy] | None) -> str:
    return " / ".join(f"{_means([found])[0]:.1f}" for found in (full, rounded) if found)
