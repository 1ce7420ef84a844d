"""The HTML report: tables, plots and circumstances in one file that fetches nothing."""

from collections.abc import Sequence
from typing import Any

from loadtest.facts import VARIANT_COLUMNS, Record, about_machine, variant_row
from loadtest.plots import Plot
from lowkey.page import render

MARGIN = {"l": 52, "r": 12, "t": 12, "b": 44}


def page(title: str, caption: str, record: Record, figures: list[list[str]], plots: Sequence[Plot]) -> str:
    """The whole report.

    Args:
        title: The test in words.
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
        caption=caption,
        record=record,
        figures=figures,
        plots=plots,
        columns=VARIANT_COLUMNS,
        variants=[variant_row(model) for model in record["models"]],
        circumstances=_circumstances(record),
    )


def _circumstances(record: Record) -> list[list[str]]:
    rows = [
        ["date", record["date"]],
        ["machine", about_machine(record)],
        ["server", f"lowkey {record['server']['version']} at {record['server']['url']}"],
    ]
    options = {name: value for name, value in record["options"].items() if name != "url"}
    return rows + [[_label(name), _value(value)] for name, value in options.items()]


def _label(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _value(value: Any) -> str:
    return "not given" if value in (None, "") else str(value)
