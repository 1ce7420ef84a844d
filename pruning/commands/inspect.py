"""`lowkey-prune inspect`: what a checkpoint is."""

from typing import Annotated

import typer

from modeling.checkpoint import open_checkpoint
from pruning import views
from pruning.commands.console import out_console


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.")],
) -> None:
    """What a checkpoint is, and for a reduced one what it was and how it was made.

    \b
    lowkey-prune inspect  reduced
    """
    out_console.print(views.tree(open_checkpoint(checkpoint)))
