"""Pages with figures: one HTML file each, with plotly's script and all data inside, which fetches nothing.

What all pages share is here: the frame (`base.html`), tables (`table.html`), styles for light and dark, and the script
that draws. A page is a template of its own package that extends `base.html`.
"""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

COLOURS = (
    "#2f7ed8",
    "#e8792b",
    "#2aa876",
    "#d64545",
    "#8c6bd8",
    "#b8860b",
    "#1aa3b8",
    "#c44e8e",
    "#7f9f3f",
    "#7a8594",
)
"""Colours of the series of a figure, which read on a light and on a dark page."""


def render(
    package: str, template: str, drawings: Mapping[str, Any], *, margin: Mapping[str, int], **fields: Any
) -> str:
    """The HTML of a page.

    Args:
        package: The package that holds the template, dotted.
        template: Name of its file. What it does not call safe is escaped: names come from other people.
        drawings: plotly figures by the ids of the elements that they are drawn into.
        margin: Pixels around the axes of each figure, as plotly's `l`, `r`, `t` and `b`.
        fields: What the template shows.
    """
    folders = (package, ""), ("lowkey", "page")
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(*folder) for folder in folders]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    files = resources.files("lowkey.page")
    return environment.get_template(template).render(
        style=files.joinpath("page.css").read_text("utf-8"),
        script=files.joinpath("page.js").read_text("utf-8"),
        plotly=get_plotlyjs(),
        data=_data(drawings, margin),
        **fields,
    )


def _data(drawings: Mapping[str, Any], margin: Mapping[str, int]) -> str:
    """The figures as JSON for a script element, which no "<" may end early."""
    data = [{"name": name, **json.loads(figure.to_json())} for name, figure in drawings.items()]
    for each in data:
        each["layout"].pop("template", None)  # the page has its own, for light and dark
        each["layout"].setdefault("margin", margin)
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")
