"""The file of figures that a benchmark writes: tried before the work, and not lost if it can't be written after it."""

import sys
from pathlib import Path
from typing import Any, NoReturn

from lowkey.files import OutputError, check_writable, write_or_keep
from modeling.checkpoint import write_json


def figures_file(given: str | Path) -> Path:
    """What `--json` names. Ends the process with one line and code 2 if nothing can be written there."""
    try:
        check_writable(Path(given))
    except OutputError as e:
        _end(e)
    return Path(given)


def write_figures(file: Path | None, figures: Any) -> None:
    """Write JSON if a file was named. Ends the process with one line, which says where they are instead, and code 2."""
    if file is None:
        return
    try:
        write_or_keep(file, lambda path: write_json(path, figures))
    except OutputError as e:
        _end(e)


def _end(error: OutputError) -> NoReturn:
    sys.stderr.write(f"error: {error}\n")
    raise SystemExit(2)
