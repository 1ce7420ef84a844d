"""`lowkey-prune report`: figures and tables -> one HTML file."""

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from lowkey import how_to_install
from pruning.commands.console import err_console, out_console
from pruning.errors import PruningError
from pruning.options import Overwrite, refuse_existing


def report(
    out: Annotated[Path, typer.Argument(help="HTML file to write.")],
    inputs: Annotated[
        list[Path],
        typer.Argument(
            help="JSON of benchmarks/pruning_table.py and of evaluate, statistics files, reduced and recovered "
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
    lowkey-prune report  report.html table.json --png pictures
    """
    if importlib.util.find_spec("plotly") is None:
        raise PruningError(f"report needs plotly, which is not installed: {how_to_install('eval')}")
    from pruning.report.inputs import read_inputs
    from pruning.report.page import all_figures, page
    from pruning.report.png import browser, write_png

    refuse_existing(out, overwrite)
    if png is not None:
        browser()
    with err_console.status("reading") as status:
        given = read_inputs(inputs)
        status.update("drawing")
        drawn = all_figures(given)
        html = page(title, given, drawn)
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        temporary.write_text(html, encoding="utf-8")
        temporary.rename(out)
        for figure in drawn if png is not None else ():
            assert png is not None
            status.update(f"drawing {figure.name}.png")
            write_png(figure, png / f"{figure.name}.png")
    out_console.print(
        f"{out}: {len(drawn)} figures, {len(html) / 1e6:.1f} MB", highlight=False, soft_wrap=True
    )
