"""`lowkey-prune sweep`: checkpoint -> table of methods by width."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
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
from pruning.batches import Batches, token_stream
from pruning.budget import check_spendable, curve_passes
from pruning.calibration import WINDOW, Encoder
from pruning.capacity import parameter_count
from pruning.commands.calibrate import draw, tell
from pruning.commands.console import err_console, out_console
from pruning.commands.planning import unfinished_of
from pruning.criteria import CRITERIA, criterion_named
from pruning.errors import PruningError
from pruning.estimate import (
    calibration_lines,
    calibration_seconds,
    disk_lines,
    evaluation_seconds,
    noted,
    reduced_bytes,
    shape_lines,
    stored_bytes,
    time_line,
    training_seconds,
)
from pruning.evaluation import DEFAULT_TOKENS, evaluation_windows
from pruning.finite import check_finite
from pruning.gradients import check_predicts, need_gradients
from pruning.interrupts import going_on_from
from pruning.memory import check_fits, evaluation_memory, training_memory, whole_memory
from pruning.options import (
    CalibrationText,
    Dataset,
    DatasetSplit,
    Device,
    DryRun,
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
from pruning.statistics import names_for
from pruning.sweep import Measuring, RecoveryPlan, Sweep
from pruning.table import Table, methods_by_width, read_unfinished
from pruning.trainable import TrainableSet, trained_count
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
    window: Annotated[
        int, typer.Option(help="Tokens per held-out window, and per window that recovery trains on.", min=1)
    ] = WINDOW,
    kl_tokens: Annotated[
        int,
        typer.Option(
            help="How many of them are compared with the dense model, rounded down to whole windows.", min=1
        ),
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
    dry_run: DryRun = False,
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
            tokens=recover, train=cast(TrainableSet, train), lr=lr, batch=batch, window=window, evaluations=1
        )
    source = checkpoint_named(src)
    refuse_input(out, "out", [source.path, *named_files(text), *named_files(heldout)])
    source.check_tensors()
    spec = source.spec
    columns = tuple(dict.fromkeys(widths or _default_widths(spec, align if per_layer else 1)))
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
        windows = evaluation_windows(encoder, heldout_text, tokens=heldout_tokens, window=window)
        recovery = None
        if settings is not None:
            recovery = RecoveryPlan(settings, read.read(settings.tokens), heldout_text)
            stream = token_stream(encoder, recovery.text, tokens=2 * window + 1, seed=0)
            Batches(stream, window=window, batch=batch, seed=0)  # a text that is too short is refused now
    planned = Sweep(
        source,
        tuple(dict.fromkeys(methods)),
        tuple(dict.fromkeys(per_layer)),
        columns,
        align,
        drawn,
        windows,
        max(kl_tokens // window, 1),
        recovery,
        where,
    )
    misfits: list[str] = []
    with noted(misfits, dry_run=dry_run):
        _check_fits(planned)
    found = _unfinished(unfinished, planned, overwrite=overwrite)
    tell([*_plan(planned, found, dry_run=dry_run), *misfits], dry_run=dry_run)
    if dry_run:
        return
    with sole_user(unfinished):
        table = _unfinished(unfinished, planned, overwrite=overwrite)
        if overwrite:
            unfinished.unlink(missing_ok=True)
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


def _default_widths(spec: ModelSpec, least: int) -> list[int]:
    """Some shares of the narrowest d_k that are `least` or more. Raises PruningError if there is none."""
    d_k = min(spec.d_k)
    widths = [n for n in (d_k * 3 // 4, d_k // 2, d_k // 4, d_k // 8) if n >= least]
    if not widths:
        raise PruningError(
            f"none of 3/4, 1/2, 1/4 and 1/8 of d_k {d_k} is {least} or more; give --width, or a lower --align"
        )
    return widths


def _plan(planned: Sweep, table: Table | None, *, dry_run: bool) -> Iterator[str]:
    """What `sweep` is going to do, line by line; `table` has what is done."""
    source, spec, device = planned.source, planned.source.spec, planned.device
    done = 0 if table is None else len(table.reduced)
    yield from shape_lines(spec)
    yield f"{counted(len(planned.cells), 'checkpoint')} to measure, {done} of them done"
    missing = planned.cells[done:]
    seeds = {seed for *_, seed in missing}
    reduced = {n: spec.with_d_k(widths_to_keep(spec, n)) for n in planned.widths}
    windows, _ = next(iter(planned.drawn.values()))
    seconds = dict.fromkeys(("calibration", "widths", "evaluation", "recovery"), 0.0)
    if planned.needed:
        names = names_for(planned.needed)
        yield from calibration_lines(names, windows, whole_memory(spec, names, windows.shape[1]))
        seconds["calibration"] = len(seeds) * calibration_seconds(spec, names, windows, device)
    curves = {(method, seed) for row, method, _, seed in missing if row != method}
    if table is not None:
        curves -= {(measured.method, measured.seed) for measured in table.curves}
    if curves:
        once = evaluation_seconds(spec, windows.numel(), windows.shape[1], device)
        seconds["widths"] = len(curves) * curve_passes(spec, planned.align) * once
    heldout, compared = (
        part[:, 1:].numel() for part in (planned.heldout, planned.heldout[: planned.compared])
    )
    window = planned.heldout.shape[1] - 1
    dense_tokens = len(missing) * compared + (heldout if table is None else 0)
    seconds["evaluation"] = evaluation_seconds(spec, dense_tokens, window, device)
    needed = [("a checkpoint at a time", max(reduced_bytes(source, one.d_k) for one in reduced.values()))]
    students = [(reduced[n], spec, count) for n, count in Counter(n for _, _, n, _ in missing).items()]
    for student, _, count in students:
        seconds["evaluation"] += count * evaluation_seconds(student, heldout + compared, window, device)
    if planned.recovery is not None:
        settings = planned.recovery.settings
        batches = settings.steps * settings.batch * settings.accumulate
        controls = len(seeds - {control.seed for control in table.controls} if table else seeds)
        measured = heldout + 3 * min(DEFAULT_TOKENS, heldout)
        for student, teacher, count in [*students, (spec, None, controls)]:
            seconds["recovery"] += count * (
                training_seconds(student, teacher, batches, settings.window, device)
                + evaluation_seconds(student, measured, window, device)
            )
        # The control is the largest that is trained: weights, and two files of value and moments in float32.
        trained = trained_count(spec, settings.train, settings.rank)
        needed.append(("its recovery", stored_bytes(source) + 2 * 12 * trained))
    yield time_line([(what, value) for what, value in seconds.items() if value], device)
    scratch = tempfile.gettempdir()
    yield from disk_lines(needed, Path(scratch, "reduced"), f"TMPDIR={scratch!r}", dry_run=dry_run)


def _check_fits(planned: Sweep) -> None:
    """Raises DoesNotFitError unless there is memory for each part; the dense model is there all the time."""
    spec, device = planned.source.spec, planned.device
    dense = 4 * parameter_count(spec)
    widest = spec.with_d_k(widths_to_keep(spec, max(planned.widths)))
    window = planned.heldout.shape[1] - 1
    windows, _ = next(iter(planned.drawn.values()))
    parts = [("evaluation", evaluation_memory([spec, widest], window, device), "a smaller model")]
    if planned.needed or planned.per_layer:
        memory = whole_memory(spec, names_for(planned.needed), windows.shape[1])
        parts.append(("calibration", memory, "methods without gradients"))
    if planned.recovery is not None:
        settings = planned.recovery.settings
        for student, teacher in ((widest, spec), (spec, None)):
            memory = training_memory(student, teacher, settings, window, device)
            memory = replace(memory, weights=dense + memory.weights)
            parts.append(("recovery", memory, "leave --recover out"))
    for what, memory, instead in parts:
        check_fits(memory, device, f"the {what} of a sweep, which holds whole models,", instead)


def _unfinished(file: Path, planned: Sweep, *, overwrite: bool) -> Table | None:
    """What an interrupted sweep left to go on from, or None; always None with `overwrite`.

    Raises:
        PruningError: It was another sweep, and `overwrite` is off; or it is no sweep's at all.
    """
    if not file.exists():
        return None
    table = read_unfinished(file)
    if overwrite:
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
