"""`lowkey-prune sweep`: checkpoint -> table of methods by width."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.table import Table as TerminalTable

from lowkey.files import check_new_file, check_writable, refuse_input, write_or_keep
from lowkey.publishing import new_json, replacing, sole_user
from lowkey.words import counted
from modeling.spec import ModelSpec
from pruning.budget import check_spendable
from pruning.calibration import WINDOW, Encoder
from pruning.commands.calibrate import draw, tell, unfinished_of
from pruning.commands.console import err_console, out_console
from pruning.criteria import CRITERIA, criterion_named
from pruning.errors import PruningError
from pruning.estimate import shape_lines
from pruning.evaluation import DEFAULT_TOKENS, evaluation_windows
from pruning.finite import check_finite
from pruning.gradients import check_predicts, need_gradients
from pruning.interrupts import going_on_from
from pruning.options import (
    CalibrationText,
    Dataset,
    DatasetSplit,
    Device,
    Field,
    Heldout,
    HeldoutTokens,
    Overwrite,
    Source,
    TextFiles,
    Tokens,
    WindowLength,
    checkpoint_named,
    device_named,
    named_files,
    text_of,
)
from pruning.progress import Busy, tokens_bar
from pruning.selection import widths_to_keep
from pruning.sweep import Measuring, RecoveryPlan, Sweep
from pruning.table import Table, methods_by_width, read_unfinished
from pruning.trainable import TrainableSet
from pruning.training import TrainingSettings

NONE = "none"
PER_LAYER = ["drrqr", "loss-aware"]
SEEDS = [0, 1, 2]


def sweep(
    src: Source,
    out: Annotated[Path, typer.Argument(help="JSON file to write; `report` draws it.")],
    methods: Annotated[
        list[str], typer.Option("--method", help="Method with one width for all layers; may be repeated.")
    ] = list(CRITERIA),  # noqa: B006
    per_layer: Annotated[
        list[str],
        typer.Option(
            metavar="METHOD",
            help=f"Method with widths chosen per layer, within the same state; may be repeated; {NONE} for none.",
        ),
    ] = PER_LAYER,
    widths: Annotated[
        list[int] | None,
        typer.Option(
            "--width",
            help="d_k to keep; may be repeated (default: 3/4, 1/2, 1/4 and 1/8).",
            show_default=False,
        ),
    ] = None,
    align: Annotated[int, typer.Option(help="Widths per layer are multiples of this even number.")] = 8,
    seeds: Annotated[
        list[int], typer.Option("--seed", help="Seed of the calibration draw; may be repeated.", min=0)
    ] = SEEDS,
    text: TextFiles = None,
    field: Field = None,
    dataset: Dataset = None,
    split: DatasetSplit = None,
    tokens: Tokens = None,
    window_length: WindowLength = None,
    heldout: Heldout = None,
    heldout_tokens: HeldoutTokens = DEFAULT_TOKENS,
    kl_tokens: Annotated[
        int, typer.Option(help="How many of them are compared with the dense model.", min=1)
    ] = 16 * WINDOW,
    recover: Annotated[
        int | None,
        typer.Option(
            metavar="TOKENS", help="Also train each checkpoint, and the control, on so many tokens."
        ),
    ] = None,
    train: Annotated[
        str, typer.Option(help="What recovery trains, as in `recover`.")
    ] = TrainingSettings.train,
    lr: Annotated[float, typer.Option(help="Its peak learning rate.")] = TrainingSettings.lr,
    batch: Annotated[int, typer.Option(help="Its windows per step.")] = TrainingSettings.batch,
    device: Device = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Measure methods at several widths and seeds: held-out perplexity, and KL and agreement with the dense model.

    Behind each cell is a checkpoint that was written, reloaded and evaluated, and removed again. The texts are the two
    sides of the bundled split unless --text or --dataset and --heldout are given.

    What is measured is saved to OUT.partial at once. Interrupted, even killed, the same command goes on from there.

    \b
    lowkey-prune sweep  demo/model table.json --device cuda
    lowkey-prune sweep  demo/model small.json --method l1 --method drrqr --per-layer none --width 64 --seed 0
    lowkey-prune sweep  demo/model recovered.json --method drrqr --width 64 --seed 0 --recover 1000000
    """
    per_layer = [] if per_layer == [NONE] else per_layer
    chosen = [criterion_named(name) for name in dict.fromkeys((*methods, *per_layer))]
    replaces = check_new_file(out, "out", overwrite=overwrite)
    unfinished = unfinished_of(out)
    check_writable(unfinished)
    where = device_named(device)
    settings = None
    if recover is not None:
        settings = TrainingSettings(
            tokens=recover, train=cast(TrainableSet, train), lr=lr, batch=batch, evaluations=1
        )
    source = checkpoint_named(src)
    refuse_input(out, "out", [source.path, *named_files(text), *named_files(heldout)])
    source.check_tensors()
    spec = source.spec
    columns = tuple(dict.fromkeys(widths or _default_widths(spec, align)))
    least = min(spec.with_d_k(widths_to_keep(spec, n)).state_bytes(0) for n in columns)
    read = CalibrationText(text, field, dataset, split, tokens, window_length, seed=0)
    for name in per_layer:
        check_spendable(spec, CRITERIA[name], least, align, read.length)
    if any(need_gradients(criterion.statistics) for criterion in chosen):
        check_predicts(read.length)
    encoder = Encoder(source)
    with Busy(err_console, "reading the weights"):
        check_finite(source)
    drawn = {seed: draw(encoder, replace(read, seed=seed)) for seed in dict.fromkeys(seeds)}
    with Busy(err_console, "reading held-out text"):
        heldout_text = text_of(heldout, "heldout")
        windows = evaluation_windows(encoder, heldout_text, tokens=heldout_tokens)
        recovery = None
        if settings is not None:
            recovery = RecoveryPlan(settings, read.read(settings.tokens), heldout_text)
    planned = Sweep(
        source,
        tuple(dict.fromkeys(methods)),
        tuple(dict.fromkeys(per_layer)),
        columns,
        align,
        drawn,
        windows,
        max(kl_tokens // WINDOW, 1),
        recovery,
        where,
    )
    with sole_user(unfinished):
        table = _unfinished(unfinished, planned, overwrite=overwrite)
        done = 0 if table is None else len(table.reduced)
        tell(
            [
                *shape_lines(spec),
                f"{counted(len(planned.cells), 'checkpoint')} to measure, {done} of them done",
            ],
            dry_run=False,
        )
        with going_on_from(unfinished):
            measuring = Measuring(
                planned,
                table,
                partial(_save, unfinished),
                partial(tokens_bar, err_console),
                partial(Busy, err_console),
            )
            finished = measuring.run()
            write_or_keep(out, partial(new_json, value=asdict(finished), replaces=replaces))
    _show(finished)


def _default_widths(spec: ModelSpec, align: int) -> list[int]:
    """Some shares of the narrowest d_k, without those that are too narrow for the alignment."""
    d_k = min(spec.d_k)
    return [n for n in (d_k * 3 // 4, d_k // 2, d_k // 4, d_k // 8) if n >= align] or [d_k]


def _unfinished(file: Path, planned: Sweep, *, overwrite: bool) -> Table | None:
    """What an interrupted sweep left, or None. With `overwrite` it is removed.

    Raises:
        PruningError: It was another sweep, and `overwrite` is off; or it is no sweep's at all.
    """
    if not file.exists():
        return None
    table = read_unfinished(file)
    if overwrite:
        file.unlink()
        return None
    now = {"checkpoint": planned.source.sha256, "device": str(planned.device), **planned.options}
    was = {"checkpoint": table.sha256, "device": table.device, **table.options}
    differs = [key for key in now if now[key] != was.get(key)]
    if differs:
        raise PruningError(
            f"{file} is of an interrupted sweep that differs in {' and '.join(differs)}; repeat its options to go on "
            "with it, or start anew with --overwrite"
        )
    return table


def _save(file: Path, table: Table) -> None:
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(asdict(table)), encoding="utf-8")


def _show(table: Table) -> None:
    header, rows = methods_by_width(table)
    seeds = counted(len({cell.seed for cell in table.reduced}), "seed")
    view = TerminalTable(
        *header,
        title=f"{table.checkpoint}: perplexity, dense {table.dense.perplexity:.2f}; mean and range of {seeds}",
    )
    for row in rows:
        view.add_row(*row)
    out_console.print(view)
