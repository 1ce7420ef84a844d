"""`lowkey-prune merge`: statistics files -> one."""

from pathlib import Path
from typing import Annotated

import typer

from pruning.commands.console import out_console
from pruning.options import (
    Overwrite,
    refuse_existing,
)
from pruning.statistics import load_statistics, merge, save_statistics


def merge_files(
    parts: Annotated[
        list[Path], typer.Argument(help="Statistics files of one checkpoint.", metavar="PART...")
    ],
    out: Annotated[Path, typer.Option(help="Statistics file to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Add up statistics files, as if their text had been calibrated in one pass.

    \b
    lowkey-prune merge  part1.safetensors part2.safetensors --out all.safetensors
    """
    refuse_existing(out, overwrite)
    statistics = merge([load_statistics(part) for part in parts])
    save_statistics(statistics, out)
    out_console.print(f"{out}: {statistics.tokens:,} tokens", highlight=False, soft_wrap=True)
