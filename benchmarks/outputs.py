"""The file of figures that a benchmark writes: tried before the work, and not lost if it can't be written after it."""

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lowkey.files import Found, OutputError, check_new_file, found_at, write_or_keep
from lowkey.publishing import new_json, remove_working_directories
from lowkey.signals import ending_on_signals

_found: dict[Path, Found | None] = {}
"""What was in the place of each file before the work, or was last written there: it is replaced."""


def figures_file(given: str | Path) -> Path:
    """What `--json` names. Ends the process with one line and code 2 if nothing can be written there."""
    path = Path(given)
    try:
        _found[path] = check_new_file(path, "json", overwrite=True)
    except OutputError as e:
        _end(e)
    return path


FiguresFile = Annotated[
    Path | None, typer.Option(parser=figures_file, metavar="FILE", help="Also write the figures here.")
]
"""The option `--json` of a benchmark whose options are Typer's."""


def write_figures(file: Path | None, figures: Any) -> None:
    """Write JSON if a file was named. Ends the process with one line, which says where they are instead, and code 2."""
    if file is None:
        return
    try:
        with ending_on_signals(remove_working_directories):
            write_or_keep(file, lambda path: new_json(path, figures, replaces=_found.get(file)))
            _found[file] = found_at(file)
    except OutputError as e:
        _end(e)


def _end(error: OutputError) -> NoReturn:
    sys.stderr.write(f"error: {error}\n")
    raise SystemExit(2)
