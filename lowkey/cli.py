"""The option that all commands have."""

from typing import Annotated

import typer

from lowkey import __version__


def _show(context: typer.Context, asked: bool) -> None:
    if asked:
        typer.echo(f"{context.find_root().info_name} {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=_show, is_eager=True, help="Print the version and exit.")
]
