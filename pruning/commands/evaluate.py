"""`lowkey-prune evaluate`: checkpoints side by side."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lowkey.files import check_new_file, refuse_input, write_or_keep
from lowkey.publishing import new_json
from pruning import views
from pruning.calibration import WINDOW
from pruning.commands.console import err_console, out_console
from pruning.errors import PruningError
from pruning.evaluation import DEFAULT_TOKENS
from pruning.evaluation.bits import LONGEST
from pruning.evaluation.suite import PARTS, EvaluationSettings, Part, evaluate_checkpoints
from pruning.finite import check_finite
from pruning.memory import check_fits, evaluation_memory
from pruning.options import Device, Overwrite, TextFiles, checkpoint_named, device_named, named_files, text_of
from pruning.progress import Busy, tokens_bar

ALL = "all"


def evaluate(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Checkpoints; the first is the baseline.", metavar="CHECKPOINT...")
    ],
    parts: Annotated[
        list[str],
        typer.Option(
            "--part", help=f"What to measure: {', '.join(PARTS)} or {ALL}; may be given several times."
        ),
    ] = ["perplexity"],  # noqa: B006
    text: TextFiles = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens to score, from the front of the text; 0 for all of it.", min=0)
    ] = DEFAULT_TOKENS,
    window: Annotated[int, typer.Option(help="Tokens per window; each starts from an empty state.")] = WINDOW,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Tokens from one window to the next, each scored with at least window - stride tokens of context "
            "(default: the window).",
            show_default=False,
        ),
    ] = None,
    drift_window: Annotated[
        int,
        typer.Option(
            help="Tokens of the windows that bits measures the drift on, if the text has as many.", min=1
        ),
    ] = LONGEST,
    seed: Annotated[int, typer.Option(help="Seed of the recall prompts and of the query noise.", min=0)] = 0,
    json: Annotated[Path | None, typer.Option(help="Also write the figures here.")] = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Perplexity, KL and agreement with the first checkpoint, state size; on request recall, identifiers, ranks, noise,
    speed, bits.

    The text is the held-out side of the bundled split unless --text is given.

    \b
    lowkey-prune evaluate  demo/model reduced-64 reduced-32 --json results.json
    lowkey-prune evaluate  demo/model reduced-64 --part all --json all.json
    lowkey-prune evaluate  demo/model reduced-64 --part bits
    lowkey-prune evaluate  demo/model reduced-64 --part identifiers --tokens 0 --window 2048
    lowkey-prune evaluate  demo/model --text my.txt --tokens 0 --window 2048 --stride 512
    """
    replaces = None if json is None else check_new_file(json, "json", overwrite=overwrite)
    settings = EvaluationSettings(
        text_of(text, "heldout"),
        _parts(parts),
        tokens,
        window,
        stride,
        drift_window,
        seed,
        device_named(device),
    )
    opened = [checkpoint_named(c) for c in checkpoints]
    if json is not None:
        refuse_input(json, "json", [*(c.path for c in opened), *named_files(text)])
    memory = evaluation_memory([checkpoint.spec for checkpoint in opened], window, settings.device)
    check_fits(memory, settings.device, "evaluation, which holds whole models in float32,", "smaller models")
    with Busy(err_console, "reading the weights"):
        for checkpoint in opened:
            checkpoint.check_tensors()
            check_finite(checkpoint)
    evaluation = evaluate_checkpoints(opened, settings, partial(tokens_bar, err_console))
    try:
        out_console.print(views.evaluation_table(evaluation))
        if "bits" in settings.parts and len(opened) > 1:
            out_console.print(views.pareto_view(evaluation))
    finally:  # a place that takes the one may not take the other
        if json is not None:
            write_or_keep(json, lambda file: new_json(file, asdict(evaluation), replaces=replaces))


def _parts(names: list[str]) -> tuple[Part, ...]:
    unknown = sorted(set(names) - {*PARTS, ALL})
    if unknown:
        raise PruningError(f"part={unknown[0]!r} is unknown; known parts: {', '.join(PARTS)}, {ALL}")
    return tuple(part for part in PARTS if part in names or ALL in names)
