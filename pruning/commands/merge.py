"""`lowkey-prune merge`: statistics files -> one."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lowkey.files import check_new_file, refuse_input, write_or_keep
from lowkey.words import counted
from pruning.commands.console import out_console
from pruning.options import Overwrite
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
    replaces = check_new_file(out, "out", overwrite=overwrite)
    refuse_input(out, "out", parts)
    statistics = merge([load_statistics(part) for part in parts])
    write_or_keep(out, partial(save_statistics, statistics, replaces=replaces))
    out_console.print(f"{out}: {counted(statistics.tokens, 'token')}", soft_wrap=True)
