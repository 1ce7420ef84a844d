"""`lowkey-prune prune`: checkpoint -> reduced checkpoint."""

from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from lowkey.files import Found, OutputTakenError, check_new_file, check_writable, refuse_input, write_or_keep
from lowkey.publishing import sole_user
from modeling.checkpoint import Checkpoint, open_checkpoint
from modeling.model import Model
from pruning import views
from pruning.budget import DEFAULT_ALIGN, check_spendable, curve_passes, spend
from pruning.calibration import WINDOW, Encoder, Text, bundled_text
from pruning.commands.calibrate import draw, run_calibration, tell
from pruning.commands.console import err_console, out_console
from pruning.commands.planning import (
    check_gradients,
    check_tensors,
    load,
    plan_calibration,
    read_weights,
    unfinished_of,
)
from pruning.commands.reconstructing import (
    PlannedReconstruction,
    Reconstruct,
    ReconstructionOptions,
    ReconstructSteps,
    ReconstructTokens,
)
from pruning.commands.reduction_plan import plan_reduction
from pruning.criteria import CRITERIA, criterion_named
from pruning.errors import PruningError
from pruning.estimate import noted
from pruning.evaluation import DEFAULT_TOKENS, compare, evaluation_json, evaluation_windows, perplexity
from pruning.gradients import check_predicts, need_gradients
from pruning.interrupts import left_behind
from pruning.memory import check_fits, evaluation_memory, whole_memory
from pruning.options import (
    Align,
    CalibrationText,
    Dataset,
    DatasetSplit,
    Device,
    DryRun,
    Field,
    Overwrite,
    PerLayer,
    Seed,
    Source,
    StateBytes,
    StreamLayers,
    TextFiles,
    Tokens,
    WindowLength,
    checkpoint_named,
    device_named,
    uniform_widths,
)
from pruning.progress import Busy, tokens_bar
from pruning.reduction import Fitted, Provenance, check_output, reduce_checkpoint
from pruning.selection import Selection, check_statistics, select
from pruning.statistics import load_statistics, names_for
from pruning.surgery import Export


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
    field: Field = None,
    dataset: Dataset = None,
    split: DatasetSplit = None,
    tokens: Tokens = None,
    window_length: WindowLength = None,
    seed: Seed = 0,
    export: Annotated[
        Export,
        typer.Option(
            help="sliced: the channels are removed, and the state shrinks. masked: their rows are zero, and shapes and "
            "config stay as they are; that saves no memory, and is for loaders that want d_k = d_v (llama.cpp, GGUF) "
            "and for measuring quality in any server."
        ),
    ] = "sliced",
    reconstruct: Reconstruct = False,
    reconstruct_tokens: ReconstructTokens = None,
    reconstruct_steps: ReconstructSteps = None,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Record held-out perplexity before and after, KL divergence and top-1 agreement.",
        ),
    ] = False,
    device: Device = "cpu",
    stream_layers: StreamLayers = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a reduced checkpoint. Stock loaders read it, unless --per-layer gave its layers different widths.

    Every tensor of it is compared with the source's, and it is run once, before it appears.

    With --per-layer, --keep, --ratio or --state-bytes only say how much state there is to spend.

    A model that does not fit in memory is calibrated layer by layer. --per-layer, --evaluate and methods that read
    gradients take the whole model.

    \b
    lowkey-prune prune  demo/model reduced --method bilinear --keep 64
    lowkey-prune prune  demo/model reduced --method drrqr --ratio 0.75 --stats demo.stats.safetensors --evaluate
    lowkey-prune prune  demo/model reduced --method loss-aware --state-bytes 400KB --per-layer
    lowkey-prune prune  demo/model reduced --method loss-aware --keep 64 --reconstruct --evaluate
    """
    if align is not None and state_bytes is None and not per_layer:
        raise PruningError(f"align={align} is for the widths that --state-bytes and --per-layer choose")
    align = DEFAULT_ALIGN if align is None else align
    criterion = criterion_named(method)
    checkpoint = checkpoint_named(src)
    check_tensors(checkpoint, dry_run=dry_run)
    widths, limit = uniform_widths(checkpoint.spec, keep, ratio, state_bytes, align)
    source = CalibrationText(text, field, dataset, split, tokens, window_length, seed)
    fit = ReconstructionOptions(reconstruct, reconstruct_tokens, reconstruct_steps, seed)
    fit.check(export)
    text_is_read = per_layer or reconstruct
    if not criterion.statistics and (stats or (source.given and not text_is_read)):
        raise PruningError(f"method={method!r} reads no statistics; drop --stats and the options of its text")
    if stats is not None and stats.exists() and source.given and not text_is_read:
        raise PruningError(
            f"stats={str(stats)!r} exists and is used as it is; drop the options of its text, "
            "or name a new file to calibrate again"
        )
    replaces = check_output([checkpoint], out, overwrite=overwrite)
    where = device_named(device)

    reused = stats is not None and stats.exists()
    calibrating = bool(criterion.statistics) and not reused
    if tokens is not None and reconstruct and not (calibrating or per_layer):
        raise PruningError(
            f"tokens={tokens} is for calibration, which is not done here; --reconstruct-tokens says how many tokens "
            "--reconstruct reads"
        )
    stats = stats or out.with_name(f"{out.name}.stats.safetensors")
    stats_replaces = None
    if calibrating:
        stats_replaces = _check_new_statistics(stats, out, overwrite=overwrite)
        refuse_input(stats, "stats", [checkpoint.path])
    statistics = None
    if reused:
        statistics = load_statistics(stats)
        check_statistics(criterion, statistics, checkpoint)
    if per_layer:
        check_spendable(checkpoint.spec, criterion, limit, align, source.length)
    if stream_layers and per_layer:
        raise PruningError("stream_layers: --per-layer measures the whole model; drop one of the two")
    names = names_for(criterion.statistics)
    misfits: list[str] = []
    if calibrating and need_gradients(names):
        check_predicts(source.length)
        with noted(misfits, dry_run=dry_run):
            check_gradients(checkpoint, names, source.length, where, stream_layers=stream_layers)
    if per_layer:
        forward = whole_memory(checkpoint.spec, names_for(()), source.length)
        what = "--per-layer, which measures the whole model,"
        with noted(misfits, dry_run=dry_run):
            check_fits(forward, where, what, "one width for all layers")
    if evaluate:
        after = checkpoint.spec.with_d_k(tuple(widths)) if export == "sliced" else checkpoint.spec
        what = "--evaluate, which holds the model before and after,"
        both = evaluation_memory([checkpoint.spec, after], WINDOW, where)
        with noted(misfits, dry_run=dry_run):
            check_fits(both, where, what, "leave --evaluate out")
    drawing = calibrating or per_layer
    encoder = Encoder(checkpoint) if drawing or reconstruct or evaluate else None
    reading = read_weights(checkpoint)
    drawn = draw(encoder, source) if encoder is not None and drawing else None
    planned = None
    if calibrating and drawn is not None:
        planned = plan_calibration(
            checkpoint,
            names,
            *drawn,
            where,
            stats,
            reading,
            whole=per_layer,
            stream_layers=stream_layers,
            overwrite=overwrite,
        )
        if not per_layer:
            with noted(misfits, dry_run=dry_run):
                planned.check_fits()
    fitting = None
    if encoder is not None and reconstruct:
        fitting = fit.plan(checkpoint, encoder, source, where)
        with noted(misfits, dry_run=dry_run):
            fitting.check_fits()
    held_out = _held_out(encoder) if encoder is not None and evaluate else None
    plan = plan_reduction(
        checkpoint,
        criterion,
        widths,
        out,
        passes=curve_passes(checkpoint.spec, align) if per_layer else 0,
        limit=limit,
        windows=None if drawn is None else drawn[0],
        calibration=planned,
        reconstruction=fitting,
        evaluating=evaluate,
        export=export,
        device=where,
        dry_run=dry_run,
    )
    tell(chain(plan, misfits), dry_run=dry_run)
    if dry_run:
        return

    budget = None
    with sole_user(unfinished_of(stats)) if calibrating else nullcontext():
        whole = per_layer or (planned is not None and not planned.streamed)
        model = load(checkpoint, where) if whole else None
        if calibrating:
            assert drawn is not None
            try:
                statistics = run_calibration(
                    checkpoint,
                    model,
                    *drawn,
                    criterion.statistics,
                    stats,
                    where,
                    replaces=stats_replaces,
                    overwrite=overwrite,
                )
            except OutputTakenError as e:
                raise OutputTakenError(f"{e}; give --stats {e.kept} to go on from it", e.kept) from e
    left = f"nothing was written but {stats}; give --stats {stats} to go on from it"
    with left_behind(left if calibrating else "nothing was written"):
        if per_layer:
            assert drawn is not None
            assert model is not None
            measured = curve_passes(checkpoint.spec, align) * drawn[0][:, 1:].numel()
            with tokens_bar(err_console, "measuring each layer", measured) as advance:
                widths, budget = spend(
                    checkpoint,
                    criterion,
                    limit,
                    align,
                    model,
                    *drawn,
                    statistics=statistics,
                    seed=seed,
                    advance=advance,
                )
        del model  # surgery needs little memory; the model is what would stay
        with Busy(err_console, f"selecting channels ({method})"):
            selection = select(checkpoint, criterion, widths, statistics=statistics, seed=seed)
        made_by = Provenance(method, seed, statistics, budget)
        write_or_keep(
            out,
            partial(
                _write,
                checkpoint,
                selection,
                made_by,
                export=export,
                replaces=replaces,
                fitting=fitting,
                held_out=held_out,
                device=where,
            ),
        )
    reduced = open_checkpoint(out)
    root = views.tree(reduced)
    views.add_written(root, checkpoint, reduced)
    out_console.print(root)


def _check_new_statistics(stats: Path, out: Path, *, overwrite: bool) -> Found | None:
    """As `check_new_file`, for the file that calibration is going to write before `out` is made."""
    if stats.absolute().is_relative_to(out.absolute()):
        raise PruningError(
            f"stats={str(stats)!r} is in out={str(out)!r}, which is made later; name another place"
        )
    if stats.exists() and not overwrite:
        raise PruningError(f"{stats} is there already; give --stats {stats} to use it, or --overwrite")
    replaces = check_new_file(stats, "stats", overwrite=overwrite)
    check_writable(unfinished_of(stats))
    return replaces


def _write(
    checkpoint: Checkpoint,
    selection: Selection,
    made_by: Provenance,
    out: Path,
    *,
    export: Export,
    replaces: Found | None,
    fitting: PlannedReconstruction | None,
    held_out: tuple[Text, Tensor] | None,
    device: torch.device,
) -> None:
    writing = Busy(err_console, "writing the reduced checkpoint and running it once")

    def fit(reduced: Checkpoint) -> Fitted:
        assert fitting is not None
        writing.stop()
        return fitting.run(reduced)

    def measure(text: Text, windows: Tensor, reduced: Model) -> dict[str, object]:
        writing.stop()
        dense, scored = checkpoint.load(device=device), windows[:, 1:].numel()
        with tokens_bar(err_console, "evaluating dense", scored) as advance:
            before = perplexity(dense, windows, advance=advance)
        with tokens_bar(err_console, "evaluating reduced", 2 * scored) as advance:
            after, divergence = compare(reduced.to(device), dense, windows, advance=advance)
        return evaluation_json(text, before, after, divergence)

    with writing:
        reduce_checkpoint(
            checkpoint,
            selection,
            made_by,
            out,
            export=export,
            replaces=replaces,
            fit=None if fitting is None else fit,
            evaluate=None if held_out is None else partial(measure, *held_out),
        )


def _held_out(encoder: Encoder) -> tuple[Text, Tensor]:
    """What `--evaluate` measures on, read before any work: a tokenizer that is no good is found now."""
    with Busy(err_console, "reading held-out text"):
        text = bundled_text("heldout")
        return text, evaluation_windows(encoder, text, tokens=DEFAULT_TOKENS)
