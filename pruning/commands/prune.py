"""`lowkey-prune prune`: checkpoint -> reduced checkpoint."""

from pathlib import Path
from typing import Annotated

import typer

from modeling.checkpoint import Checkpoint, open_checkpoint
from modeling.model import Model
from pruning import views
from pruning.budget import DEFAULT_ALIGN, Budget, curve_passes, spend
from pruning.calibration import bundled_text
from pruning.commands.calibrate import run_calibration, windows_and_model
from pruning.commands.console import err_console, out_console
from pruning.commands.evaluate import perplexity_of
from pruning.criteria import CRITERIA, Criterion, criterion_named
from pruning.errors import PruningError
from pruning.evaluation import DEFAULT_TOKENS, evaluation_json
from pruning.options import (
    Align,
    CalibrationText,
    Device,
    Overwrite,
    PerLayer,
    Seed,
    Source,
    StateBytes,
    TextFiles,
    WindowCount,
    WindowLength,
    device_named,
    uniform_widths,
)
from pruning.progress import tokens_bar
from pruning.reduction import Provenance, check_output, reduce_checkpoint
from pruning.selection import select
from pruning.statistics import Statistics, load_statistics, save_statistics


def prune(
    src: Source,
    out: Annotated[Path, typer.Argument(help="Directory of the reduced checkpoint.")],
    method: Annotated[str, typer.Option(help="; ".join(f"{c.name}: {c.summary}" for c in CRITERIA.values()))],
    keep: Annotated[int | None, typer.Option(help="Channels to keep per head, in every layer.")] = None,
    ratio: Annotated[
        float | None, typer.Option(help="Share of channels to remove, instead of --keep (0.5 halves).")
    ] = None,
    state_bytes: StateBytes = None,
    per_layer: PerLayer = False,
    align: Align = None,
    stats: Annotated[
        Path | None,
        typer.Option(
            help="Statistics file: used if it exists, else calibrated and saved there "
            "(default: calibrate and save OUT.stats.safetensors)."
        ),
    ] = None,
    text: TextFiles = None,
    windows: WindowCount = None,
    window_length: WindowLength = None,
    seed: Seed = 0,
    evaluate: Annotated[
        bool, typer.Option("--evaluate", help="Record held-out perplexity before and after.")
    ] = False,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Write a reduced checkpoint. Stock loaders read it, unless --per-layer gave its layers different widths.

    With --per-layer, --keep, --ratio or --state-bytes only say how much state there is to spend.

    \b
    lowkey-prune prune  demo/model reduced --method bilinear --keep 64
    lowkey-prune prune  demo/model reduced --method drrqr --ratio 0.75 --stats demo.stats.safetensors --evaluate
    lowkey-prune prune  demo/model reduced --method loss-aware --state-bytes 400KB --per-layer
    """
    if align is not None and state_bytes is None and not per_layer:
        raise PruningError(f"align={align} is for the widths that --state-bytes and --per-layer choose")
    align = DEFAULT_ALIGN if align is None else align
    criterion = criterion_named(method)
    checkpoint = open_checkpoint(src)
    widths, limit = uniform_widths(checkpoint.spec, keep, ratio, state_bytes, align)
    source = CalibrationText(text, windows, window_length, seed)
    if not criterion.statistics and (stats or (source.given and not per_layer)):
        raise PruningError(
            f"method={method!r} reads no statistics; drop --stats, --text, --windows and --window-length"
        )
    if stats is not None and stats.exists() and source.given and not per_layer:
        raise PruningError(
            f"stats={str(stats)!r} exists and is used as it is; drop --text, --windows and --window-length, "
            "or name a new file to calibrate again"
        )
    check_output(checkpoint, out, overwrite=overwrite)
    device_named(device)

    statistics = None
    if criterion.statistics:
        statistics = _statistics(checkpoint, criterion, out, stats, source, device)
    budget = None
    if per_layer:
        widths, budget = _spend(checkpoint, criterion, limit, align, statistics, source, device)
    with err_console.status(f"selecting channels ({method})"):
        selection = select(checkpoint, criterion, widths, statistics=statistics, seed=seed)

    def measure(reduced: Model) -> dict[str, object]:
        held_out = bundled_text("heldout")
        dense = perplexity_of(checkpoint, checkpoint.load(device=device), held_out, DEFAULT_TOKENS, "dense")
        after = perplexity_of(checkpoint, reduced.to(device), held_out, DEFAULT_TOKENS, "reduced")
        return evaluation_json(held_out, [("dense", dense), ("reduced", after)])

    reduce_checkpoint(
        checkpoint,
        selection,
        Provenance(method, seed, statistics, budget),
        out,
        overwrite=overwrite,
        evaluate=measure if evaluate else None,
    )
    out_console.print(views.tree(open_checkpoint(out)))


def _statistics(
    checkpoint: Checkpoint,
    criterion: Criterion,
    out: Path,
    stats: Path | None,
    source: CalibrationText,
    device: str,
) -> Statistics:
    """Reuse --stats if it exists, else calibrate and save."""
    if stats is not None and stats.exists():
        return load_statistics(stats)
    statistics = run_calibration(checkpoint, criterion.statistics, source, device)
    save_statistics(statistics, stats or out.with_name(f"{out.name}.stats.safetensors"))
    return statistics


def _spend(
    checkpoint: Checkpoint,
    criterion: Criterion,
    limit: int,
    align: int,
    statistics: Statistics | None,
    source: CalibrationText,
    device: str,
) -> tuple[tuple[int, ...], Budget]:
    ids, origin, model = windows_and_model(checkpoint, source, device)
    total = curve_passes(checkpoint.spec, align) * ids[:, 1:].numel()
    with tokens_bar(err_console, "measuring each layer", total) as advance:
        return spend(
            checkpoint,
            criterion,
            limit,
            align,
            model,
            ids,
            origin,
            statistics=statistics,
            seed=source.seed,
            advance=advance,
        )
