"""`lowkey-prune inspect`: what a checkpoint is."""

from typing import Annotated

import typer

from pruning import views
from pruning.commands.console import out_console
from pruning.options import checkpoint_named


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.")],
) -> None:
    """What a checkpoint is, layer by layer and tensor by tensor, and how a reduced one was made (before => after).

    \b
    lowkey-prune inspect  reduced
    """
    opened = checkpoint_named(checkpoint)
    opened.check_tensors()
    root = views.tree(opened)
    views.add_layers(root, opened)
    out_console.print(root)
