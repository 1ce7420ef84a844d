"""`lowkey-prune report`: figures and tables -> one HTML file."""

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from lowkey import how_to_install
from lowkey.files import check_new_file, check_writable, refuse_input, refuse_link
from lowkey.publishing import new_file
from lowkey.words import counted, in_units
from pruning.commands.console import err_console, out_console
from pruning.errors import PruningError
from pruning.options import Overwrite
from pruning.progress import Busy


def report(
    out: Annotated[Path, typer.Argument(help="HTML file to write.")],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="JSON of sweep, of evaluate and of the MQAR benchmark, statistics files, reduced and recovered "
            "checkpoints; any number of each.",
            metavar="INPUT...",
        ),
    ],
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "State reduction",
    png: Annotated[
        Path | None, typer.Option(help="Also write each figure here as a picture; needs Chromium.")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """One self-contained page of what was measured; it needs no network. Takes plotly, of the extra `eval`.

    What an input lacks is left out, and said at the end of the page.

    \b
    lowkey-prune report  report.html table.json results.json demo.stats.safetensors reduced-64 reduced-32
    lowkey-prune report  figures.html table.json --png pictures
    """
    if importlib.util.find_spec("plotly") is None:
        raise PruningError(f"report needs plotly, which is not installed: {how_to_install('eval')}")
    from pruning.report.inputs import read_inputs
    from pruning.report.page import all_figures, page
    from pruning.report.png import browser, write_png

    replaces = check_new_file(out, "out", overwrite=overwrite)
    refuse_input(out, "out", inputs)
    if png is not None:
        browser()
        refuse_link(png, "png")
        check_writable(png / "figure.png")
    with Busy(err_console, "reading") as busy:
        given = read_inputs(inputs)
        busy.say("drawing")
        drawn = all_figures(given)
        pictures = {} if png is None else {png / f"{figure.name}.png": figure for figure in drawn}
        replaced = {picture: check_new_file(picture, "png", overwrite=overwrite) for picture in pictures}
        html = page(title, given, drawn)
        with new_file(out, replaces=replaces) as temporary:
            temporary.write_text(html, encoding="utf-8")
        for picture, figure in pictures.items():
            busy.say(f"drawing {picture.name}")
            write_png(figure, picture, replaces=replaced[picture])
    out_console.print(f"{out}: {counted(len(drawn), 'figure')}, {in_units(len(html))}", soft_wrap=True)
