"""`lowkey-prune`: calibrate, merge, prune, evaluate, inspect."""

import os

# Before torch is imported: threads that spin between operations slow down everything else on the machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import Tensor
from typer.core import TyperGroup

from modeling.checkpoint import Checkpoint, CheckpointError, open_checkpoint, write_json
from modeling.families import ConfigError
from modeling.model import Model
from pruning import views
from pruning.budget import DEFAULT_ALIGN, Budget, curve_passes, spend
from pruning.calibration import Encoder, Origin, Text, bundled_text
from pruning.criteria import CRITERIA, Criterion, criterion_named
from pruning.errors import PruningError
from pruning.evaluation import (
    DEFAULT_TOKENS,
    Perplexity,
    evaluation_json,
    evaluation_windows,
    perplexity,
)
from pruning.gradients import GRADIENTS
from pruning.options import (
    Align,
    CalibrationText,
    Device,
    Methods,
    Overwrite,
    PerLayer,
    Seed,
    Source,
    StateBytes,
    TextFiles,
    WindowCount,
    WindowLength,
    device_named,
    refuse_existing,
    text_of,
    uniform_widths,
)
from pruning.progress import tokens_bar
from pruning.reduction import Provenance, check_output, reduce_checkpoint, versions
from pruning.selection import select
from pruning.statistics import (
    StatisticName,
    Statistics,
    collect,
    load_statistics,
    merge,
    save_statistics,
)

out_console = Console()
err_console = Console(stderr=True)


class Commands(TyperGroup):
    """Turns the errors that a user can mend into one line and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (PruningError, CheckpointError, ConfigError) as e:
            err_console.print(f"error: {e}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(2) from e


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)


@app.callback()
def main() -> None:
    """Make linear-attention checkpoints cheaper to serve by removing key/query channels.

    \b
    lowkey-prune prune     demo/model reduced --method bilinear --keep 64
    lowkey-prune evaluate  demo/model reduced
    lowkey-prune inspect   reduced
    """


@app.command()
def calibrate(
    src: Source,
    out: Annotated[Path, typer.Argument(help="Statistics file to write (.safetensors).")],
    methods: Methods = None,
    text: TextFiles = None,
    windows: WindowCount = None,
    window_length: WindowLength = None,
    seed: Seed = 0,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Run text through a checkpoint and save what data-driven methods read.

    Gradients cost a second pass, forward and backward; only a --method that reads them has them collected. The
    text is CPython's own sources (training side of the bundled split) unless --text is given.

    \b
    lowkey-prune calibrate  demo/model demo.stats.safetensors
    lowkey-prune calibrate  demo/model part1.safetensors --text a.txt --text b.txt --windows 64 --seed 1
    lowkey-prune calibrate  demo/model all.safetensors --method taylor --method loss-aware
    """
    needed = {name for method in methods or () for name in criterion_named(method).statistics}
    refuse_existing(out, overwrite)
    source = CalibrationText(text, windows, window_length, seed)
    statistics = _calibrate(open_checkpoint(src), needed, source, device)
    save_statistics(statistics, out)
    out_console.print(f"{out}: {statistics.tokens:,} tokens", highlight=False, soft_wrap=True)


@app.command(name="merge")
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


@app.command()
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
        dense = _perplexity(checkpoint, checkpoint.load(device=device), held_out, DEFAULT_TOKENS, "dense")
        after = _perplexity(checkpoint, reduced.to(device), held_out, DEFAULT_TOKENS, "reduced")
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


@app.command()
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
    results = [(c, _perplexity(c, c.load(device=device), source, tokens, c.source)) for c in opened]
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


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint directory or hub id.")],
) -> None:
    """What a checkpoint is, and for a reduced one what it was and how it was made.

    \b
    lowkey-prune inspect  reduced
    """
    out_console.print(views.tree(open_checkpoint(checkpoint)))


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
    statistics = _calibrate(checkpoint, criterion.statistics, source, device)
    save_statistics(statistics, stats or out.with_name(f"{out.name}.stats.safetensors"))
    return statistics


def _calibrate(
    checkpoint: Checkpoint, needed: Collection[StatisticName], source: CalibrationText, device: str
) -> Statistics:
    ids, origin, model = _windows_and_model(checkpoint, source, device)
    passes = 2 if set(needed) & set(GRADIENTS) else 1
    with tokens_bar(err_console, "calibrating", passes * ids.numel()) as advance:
        return collect(model, ids, origin, checkpoint.sha256, needed=needed, advance=advance)


def _spend(
    checkpoint: Checkpoint,
    criterion: Criterion,
    limit: int,
    align: int,
    statistics: Statistics | None,
    source: CalibrationText,
    device: str,
) -> tuple[tuple[int, ...], Budget]:
    ids, origin, model = _windows_and_model(checkpoint, source, device)
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


def _windows_and_model(
    checkpoint: Checkpoint, source: CalibrationText, device: str
) -> tuple[Tensor, Origin, Model]:
    target = device_named(device)
    with err_console.status("reading text"):
        ids, origin = source.draw(checkpoint)
    with err_console.status("loading the checkpoint"):
        return ids, origin, checkpoint.load(device=target)


def _perplexity(
    checkpoint: Checkpoint, model: Model, text: Text, tokens: int, description: str
) -> Perplexity:
    windows = evaluation_windows(Encoder(checkpoint), text, tokens=tokens)
    with tokens_bar(err_console, f"evaluating {description}", windows[:, 1:].numel()) as advance:
        return perplexity(model, windows, advance=advance)
