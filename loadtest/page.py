"""The HTML report: tables, plots and circumstances in one file that fetches nothing."""

from collections.abc import Sequence
from typing import Any

from loadtest.facts import VARIANT_COLUMNS, Record, about_machine, variant_row
from loadtest.plots import Plot
from lowkey.page import render
from lowkey.words import Judged

Row = Sequence[str | Judged]
MARGIN = {"l": 52, "r": 12, "t": 12, "b": 44}


def page(
    title: str, finding: str, caption: str, record: Record, figures: Sequence[Row], plots: Sequence[Plot]
) -> str:
    """The whole report.

    Args:
        title: The test in words.
        finding: What came out, in one sentence.
        caption: How to read the figures.
        record: The JSON of the test, see `facts.circumstances`.
        figures: Header and rows of the table.
    """
    return render(
        "loadtest",
        "page.html",
        {plot.name: plot.figure for plot in plots},
        margin=MARGIN,
        title=title,
        finding=finding,
        machine=about_machine(record),
        caption=caption,
        record=record,
        figures=[[_whole(cell) for cell in row] for row in figures],
        plots=plots,
        columns=VARIANT_COLUMNS,
        variants=[variant_row(model) for model in record["models"]],
        circumstances=_circumstances(record),
        options=_options(record),
    )


def _whole(cell: str | Judged) -> str | Judged:
    """The cell with its interval in one piece, where a narrow screen has to break it."""
    if isinstance(cell, Judged):
        return Judged(_whole_text(cell.text), cell.mark)
    return _whole_text(cell)


def _whole_text(text: str) -> str:
    return text.replace(" to ", "\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}")


def _circumstances(record: Record) -> list[list[str]]:
    return [
        ["date", record["date"]],
        ["machine", about_machine(record)],
        ["server", f"lowkey {record['server']['version']} at {record['server']['url']}"],
    ]


def _options(record: Record) -> list[list[str]]:
    options = {name: value for name, value in record["options"].items() if name != "url"}
    return [[_label(name), _value(value)] for name, value in options.items()]


def _label(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _value(value: Any) -> str:
    return "not given" if value in (None, "") else str(value)
