"""`lowkey-prune inspect`: what a checkpoint is."""

from pathlib import Path
from typing import Annotated

import typer
from rich.tree import Tree

from modeling.families import family_of
from modeling.sources import as_path, has_weights, read_json
from pruning import views
from pruning.commands.console import out_console
from pruning.listing import add_layers
from pruning.options import check_prunable, checkpoint_named
from pruning.record import record_of


def inspect(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Checkpoint directory, hub id, or a config.json (or a directory that holds nothing else) without its "
            "weights."
        ),
    ],
) -> None:
    """What a checkpoint is, layer by layer and tensor by tensor, and how a reduced one was made (before => after).

    Also what its requests take on a server; from a config.json alone, before any weights are downloaded, as well.

    \b
    lowkey-prune inspect  reduced
    lowkey-prune inspect  Qwen3.8-27B/config.json
    """
    config = _config_alone(as_path(checkpoint))
    out_console.print(_whole(checkpoint) if config is None else _shapes(checkpoint, config))


def _config_alone(path: Path) -> Path | None:
    """The config that is all there is to look at, or None for a checkpoint."""
    if path.suffix == ".json" and path.is_file():
        return path
    config = path / "config.json"
    weights = has_weights(path) or any(path.glob("*.gguf"))
    return config if config.is_file() and not weights else None


def _shapes(name: str, file: Path) -> Tree:
    config = read_json(file)
    spec = family_of(config).spec(config)
    check_prunable(spec, name)
    root = views.shapes(name, spec)
    views.add_capacity(root, spec)
    return root


def _whole(name: str) -> Tree:
    opened = checkpoint_named(name)
    opened.check_tensors()
    root = views.tree(opened)
    views.add_capacity(root, opened.spec, record_of(opened))
    add_layers(root, opened)
    return root
