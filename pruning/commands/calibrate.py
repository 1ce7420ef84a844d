"""`lowkey-prune calibrate`: text -> statistics file."""

from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from lowkey.files import Found, check_new_file, check_writable, refuse_input, write_or_keep
from lowkey.publishing import sole_user
from lowkey.words import counted
from modeling.checkpoint import Checkpoint
from modeling.model import Model
from modeling.sources import local_directory
from pruning.calibration import BATCH, Encoder, Origin, take_shard
from pruning.collection import collect, tokens_to_run
from pruning.commands.console import err_console, out_console
from pruning.commands.planning import (
    Calibration,
    check_gradients,
    check_tensors,
    load,
    notes,
    plan_calibration,
    read_weights,
    unfinished_of,
)
from pruning.criteria import criterion_named
from pruning.errors import PruningError
from pruning.estimate import disk_lines, noted, shape_lines, time_line
from pruning.gradients import check_predicts, need_gradients
from pruning.interrupts import going_on_from, left_behind
from pruning.memory import whole_memory
from pruning.on_ray import Job, check_installed, collect_on_ray, connected, room
from pruning.options import (
    CalibrationText,
    Dataset,
    DatasetSplit,
    Device,
    DryRun,
    Field,
    Methods,
    Overwrite,
    Seed,
    Source,
    StreamLayers,
    TextFiles,
    Tokens,
    WindowLength,
    checkpoint_named,
    device_named,
    named_files,
    shard_numbers,
)
from pruning.progress import Busy, tokens_bar
from pruning.statistics import StatisticName, Statistics, names_for, save_statistics
from pruning.streaming import collect_streaming, layers_to_run


def calibrate(
    src: Source,
    out: Annotated[Path, typer.Argument(help="Statistics file to write (.safetensors).")],
    methods: Methods = None,
    text: TextFiles = None,
    field: Field = None,
    dataset: Dataset = None,
    split: DatasetSplit = None,
    tokens: Tokens = None,
    window_length: WindowLength = None,
    seed: Seed = 0,
    shard: Annotated[
        str,
        typer.Option(help="i/n: run the i-th of n shares of the windows, on each of n machines; then merge."),
    ] = "1/1",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Run all shards on a Ray cluster: host:port, auto (the one that this machine is in) or local.",
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(help="Shards for --ray (default: as many as the cluster runs at once).", min=1),
    ] = None,
    device: Device = "cpu",
    stream_layers: StreamLayers = False,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Run text through a checkpoint and save what data-driven methods read.

    Gradients cost a second pass, forward and backward; only a --method that reads them has them collected. The
    text is CPython's own sources (training side of the bundled split) unless --text or --dataset is given.

    A model that does not fit in memory runs layer by layer: all tokens through one, then through the next. Gradients
    take the whole model.

    Work is saved to OUT.partial every two minutes and when Ctrl-C is pressed. Interrupted, even killed, the same
    command goes on from there. On a Ray cluster nothing is saved before the end; a shard whose process or machine goes
    away is run again.

    \b
    lowkey-prune calibrate  demo/model demo.stats.safetensors
    lowkey-prune calibrate  demo/model all.safetensors --text 'src/**/*.py' --tokens 65536 --method loss-aware
    lowkey-prune calibrate  demo/model part1.safetensors --text data.jsonl --field body --shard 1/4
    lowkey-prune calibrate  demo/model all.safetensors --tokens 1000000 --ray auto
    """
    if shards is not None and ray is None:
        raise PruningError(f"shards={shards} is for --ray; for one of several machines give --shard i/n")
    if shard != "1/1" and ray is not None:
        raise PruningError(f"shard={shard!r} is one machine's share; with --ray give --shards")
    if ray is not None and ":" in device:
        raise PruningError(
            f"device={device!r}: with --ray a shard runs on the GPU that Ray gives it; give cuda"
        )
    if ray is not None and stream_layers:
        raise PruningError("stream_layers is for one machine: a shard of --ray holds the whole model")
    if ray is not None:
        check_installed()
    needed = {name for method in methods or () for name in criterion_named(method).statistics}
    replaces = check_new_file(out, "out", overwrite=overwrite)
    check_writable(unfinished_of(out))
    source = CalibrationText(text, field, dataset, split, tokens, window_length, seed)
    numbers = shard_numbers(shard)
    where = device_named(device)
    checkpoint = checkpoint_named(src)
    refuse_input(out, "out", [checkpoint.path, *named_files(text)])
    check_tensors(checkpoint, dry_run=dry_run)
    names = names_for(needed)
    misfits: list[str] = []
    encoder = Encoder(checkpoint)
    if need_gradients(names):
        check_predicts(source.length)
        if ray is None:
            with noted(misfits, dry_run=dry_run):
                check_gradients(checkpoint, names, source.length, where, stream_layers=stream_layers)
    reading = read_weights(checkpoint)
    windows, origin = draw(encoder, source, numbers)
    if ray is None:
        planned = plan_calibration(
            checkpoint,
            names,
            windows,
            origin,
            where,
            out,
            reading,
            stream_layers=stream_layers,
            overwrite=overwrite,
        )
        with noted(misfits, dry_run=dry_run):
            planned.check_fits()
    else:
        planned = Calibration(checkpoint, names, windows, where, False, reading)
    plan = [
        *shape_lines(checkpoint.spec),
        *planned.lines(),
        time_line(planned.times(), where),
        # On a cluster no progress is saved.
        *disk_lines(planned.sizes()[: 1 if ray else None], out, dry_run=dry_run),
        *notes(checkpoint),
        *misfits,
    ]
    tell(plan, dry_run=dry_run)
    if dry_run:
        return
    if ray is not None:
        with left_behind("nothing was saved"):
            statistics = calibrate_on_ray(ray, shards, checkpoint, windows, origin, names, where)
        write_or_keep(out, partial(save_statistics, statistics, replaces=replaces))
    else:
        with sole_user(unfinished_of(out)):
            model = None if planned.streamed else load(checkpoint, where)
            statistics = run_calibration(
                checkpoint, model, windows, origin, needed, out, where, replaces=replaces, overwrite=overwrite
            )
    out_console.print(f"{out}: {counted(statistics.tokens, 'token')}", soft_wrap=True)


def calibrate_on_ray(
    address: str,
    shards: int | None,
    checkpoint: Checkpoint,
    windows: Tensor,
    origin: Origin,
    needed: tuple[StatisticName, ...],
    device: torch.device,
) -> Statistics:
    """Collect statistics in shards on the Ray cluster at `address`."""
    batches = -(-len(windows) // BATCH)
    memory = whole_memory(checkpoint.spec, needed, windows.shape[1]).total
    directory = local_directory(checkpoint.source)
    source = checkpoint.source if directory is None else str(directory.absolute())
    job = Job(source, str(device), needed, shards or 1, torch.get_num_threads(), memory)
    with connected(address):
        at_once = room(job)
        job = replace(job, shards=shards or min(at_once, batches))
        err_console.print(f"{counted(job.shards, 'shard')}, {at_once} at once")
        with tokens_bar(err_console, "calibrating", tokens_to_run(windows, needed)) as advance:
            statistics = collect_on_ray(job, windows, origin, advance, at_once)
    statistics.check_source(checkpoint)
    return statistics


def tell(plan: Iterable[str], *, dry_run: bool) -> None:
    """Show what is going to be done: on standard output where that is all, else as a message before the work."""
    console = out_console if dry_run else err_console
    for line in plan:
        console.print(line, soft_wrap=True)


def draw(encoder: Encoder, source: CalibrationText, shard: tuple[int, int] = (1, 1)) -> tuple[Tensor, Origin]:
    """The windows of one shard, int64 `[count, length]`, and where they came from."""
    with Busy(err_console, "reading text"):
        windows, origin = source.draw(encoder)
    return (windows, origin) if shard == (1, 1) else take_shard(windows, origin, *shard)


def run_calibration(
    checkpoint: Checkpoint,
    model: Model | None,
    windows: Tensor,
    origin: Origin,
    needed: Collection[StatisticName],
    out: Path,
    device: torch.device,
    *,
    replaces: Found | None,
    overwrite: bool,
) -> Statistics:
    """Collect and save statistics, going on from what an interrupted run left unless `overwrite` is given. The caller
    is the `sole_user` of that file.

    Args:
        model: the whole model; None to hold one layer at a time.
    """
    unfinished = unfinished_of(out)
    if overwrite:
        unfinished.unlink(missing_ok=True)
    with going_on_from(unfinished):
        with Busy(err_console, "hashing the weights"):
            source_sha256 = checkpoint.sha256
        if model is None:
            tokens = windows.numel() * layers_to_run(checkpoint.spec)
            with tokens_bar(err_console, "calibrating layer by layer", tokens) as advance:
                statistics = collect_streaming(
                    checkpoint, windows, origin, device=device, advance=advance, partial=unfinished
                )
        else:
            with tokens_bar(err_console, "calibrating", tokens_to_run(windows, needed)) as advance:
                statistics = collect(
                    model,
                    windows,
                    origin,
                    source_sha256,
                    needed=needed,
                    advance=advance,
                    partial=unfinished,
                )
        write_or_keep(out, partial(save_statistics, statistics, replaces=replaces))
    return statistics
