"""`lowkey-prune evaluate`: held-out perplexity, side by side."""

from pathlib import Path
from typing import Annotated

import typer

from modeling.checkpoint import Checkpoint, open_checkpoint, write_json
from modeling.model import Model
from pruning import views
from pruning.calibration import Encoder, Text
from pruning.commands.console import err_console, out_console
from pruning.evaluation import DEFAULT_TOKENS, Perplexity, evaluation_windows, perplexity
from pruning.options import (
    Device,
    TextFiles,
    device_named,
    text_of,
)
from pruning.progress import tokens_bar
from pruning.reduction import versions


def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Checkpoints; the first is the baseline.", metavar="CHECKPOINT...")
    ],
    text: TextFiles = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens to predict, from the front of the text; 0 for all of it.", min=0)
    ] = DEFAULT_TOKENS,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    device: Device = "cpu",
) -> None:
    """Held-out perplexity and state size, side by side.

    The text is the held-out side of the bundled split unless --text is given. Windows of 512 tokens, each from an
    empty state.

    \b
    lowkey-prune evaluate  demo/model reduced-64 reduced-32 --json results.json
    lowkey-prune evaluate  demo/model --text my.txt --tokens 0
    """
    device_named(device)
    opened = [open_checkpoint(c) for c in checkpoints]
    source = text_of(text, "heldout")
    results = [(c, perplexity_of(c, c.load(device=device), source, tokens, c.source)) for c in opened]
    if json is not None:
        json.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            json,
            {
                "text": source.name,
                "text_sha256": source.sha256,
                "versions": versions(),
                "checkpoints": [
                    {
                        "name": c.source,
                        "sha256": c.sha256,
                        "d_k": list(c.spec.d_k),
                        "state_bytes": c.spec.state_bytes(),
                        **result.as_json(),
                    }
                    for c, result in results
                ],
            },
        )
    out_console.print(views.evaluation_table(results))


def perplexity_of(
    checkpoint: Checkpoint, model: Model, text: Text, tokens: int, description: str
) -> Perplexity:
    windows = evaluation_windows(Encoder(checkpoint), text, tokens=tokens)
    with tokens_bar(err_console, f"evaluating {description}", windows[:, 1:].numel()) as advance:
        return perplexity(model, windows, advance=advance)
