"""The HTML report: tables, plots and circumstances in one file that fetches nothing."""

import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from loadtest.facts import VARIANT_COLUMNS, Record, about_machine, variant_row
from loadtest.plots import Plot


def page(title: str, caption: str, record: Record, figures: list[list[str]], plots: Sequence[Plot]) -> str:
    """The whole report.

    Args:
        title: the test in words.
        caption: how to read the figures.
        record: the JSON of the test, see `facts.circumstances`.
        figures: header and rows of the table.
    """
    files = resources.files("loadtest")

    def text(name: str) -> str:
        return files.joinpath(name).read_text("utf-8")

    # What the page does not call safe is escaped: names and sources come from a server, which may be anybody's.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text("page.html")).render(
        title=title,
        caption=caption,
        record=record,
        figures=figures,
        plots=plots,
        columns=VARIANT_COLUMNS,
        variants=[variant_row(model) for model in record["models"]],
        circumstances=_circumstances(record),
        style=text("page.css"),
        script=text("page.js"),
        plotly=get_plotlyjs(),
        data=_data(plots),
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


def _data(plots: Sequence[Plot]) -> str:
    """The plots' data for a script element, which no "<" may end early."""
    data = [{"name": plot.name, **json.loads(plot.figure.to_json())} for plot in plots]
    for plot in data:
        plot["layout"].pop("template", None)  # the page has its own, for light and dark
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")
