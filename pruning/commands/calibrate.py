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
from pruning.collection import collect, resumed, tokens_to_run
from pruning.commands.console import err_console, out_console
from pruning.criteria import criterion_named
from pruning.errors import PruningError
from pruning.estimate import (
    PROCESS_BYTES,
    calibration_bytes,
    calibration_lines,
    calibration_seconds,
    disk_line,
    shape_lines,
    statistics_bytes,
    time_line,
)
from pruning.finite import check_finite
from pruning.gradients import check_predicts, need_gradients
from pruning.interrupts import going_on_from, left_behind
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
    TextFiles,
    Tokens,
    WindowLength,
    checkpoint_named,
    device_named,
    named_files,
    shard_numbers,
)
from pruning.progress import Busy, tokens_bar
from pruning.statistics import StatisticName, Statistics, load_unfinished, names_for, save_statistics, shapes


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
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Run text through a checkpoint and save what data-driven methods read.

    Gradients cost a second pass, forward and backward; only a --method that reads them has them collected. The
    text is CPython's own sources (training side of the bundled split) unless --text or --dataset is given.

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
    checkpoint.check_tensors()
    names = names_for(needed)
    encoder = Encoder(checkpoint)
    if need_gradients(names):
        check_predicts(source.length)
    with Busy(err_console, "reading the weights"):
        check_finite(checkpoint)
    windows, origin = draw(encoder, source, numbers)
    if ray is None:
        check_unfinished(out, checkpoint, origin, names, overwrite=overwrite)
    plan = [
        *shape_lines(checkpoint.spec),
        *calibration_lines(checkpoint.spec, names, windows),
        time_line([("calibration", calibration_seconds(checkpoint.spec, names, windows, where))], where),
        disk_line([("the statistics", statistics_bytes(checkpoint.spec, names))], out),
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
            with Busy(err_console, "loading the checkpoint"):
                model = checkpoint.load(device=where)
            statistics = run_calibration(
                checkpoint, model, windows, origin, needed, out, replaces=replaces, overwrite=overwrite
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
    memory = PROCESS_BYTES + sum(calibration_bytes(checkpoint.spec, needed, windows.shape[1]))
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


def unfinished_of(out: Path) -> Path:
    """The file in which a calibration or a sweep into `out` keeps its progress."""
    return out.with_name(f"{out.name}.partial")


def check_unfinished(
    out: Path, checkpoint: Checkpoint, origin: Origin, names: Collection[StatisticName], *, overwrite: bool
) -> None:
    """Look at what an interrupted calibration into `out` left: this one goes on from it, or replaces it.

    Raises:
        PruningError: it was another calibration, and `overwrite` is off; or it is no calibration's at all.
    """
    unfinished = unfinished_of(out)
    if overwrite and unfinished.exists():
        load_unfinished(unfinished)
    elif unfinished.exists():
        resumed(unfinished, checkpoint.sha256, origin, shapes(checkpoint.spec, names))


def run_calibration(
    checkpoint: Checkpoint,
    model: Model,
    windows: Tensor,
    origin: Origin,
    needed: Collection[StatisticName],
    out: Path,
    *,
    replaces: Found | None,
    overwrite: bool,
) -> Statistics:
    """Collect and save statistics, going on from what an interrupted run left unless `overwrite` is given. The caller
    is the `sole_user` of that file."""
    unfinished = unfinished_of(out)
    if overwrite:
        unfinished.unlink(missing_ok=True)
    with going_on_from(unfinished):
        with tokens_bar(err_console, "calibrating", tokens_to_run(windows, needed)) as advance:
            statistics = collect(
                model, windows, origin, checkpoint.sha256, needed=needed, advance=advance, partial=unfinished
            )
        write_or_keep(out, partial(save_statistics, statistics, replaces=replaces))
    return statistics
