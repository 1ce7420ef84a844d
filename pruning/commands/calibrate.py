"""`lowkey-prune calibrate`: text -> statistics file."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from modeling.checkpoint import Checkpoint, open_checkpoint
from modeling.model import Model
from pruning.calibration import Origin, take_shard
from pruning.collection import collect
from pruning.commands.console import err_console, out_console
from pruning.criteria import criterion_named
from pruning.estimate import calibration_lines, disk_line, shape_lines, statistics_bytes
from pruning.gradients import GRADIENTS
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
    device_named,
    refuse_existing,
    shard_numbers,
)
from pruning.progress import tokens_bar
from pruning.statistics import StatisticName, Statistics, names_for, save_statistics


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
    device: Device = "cpu",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Run text through a checkpoint and save what data-driven methods read.

    Gradients cost a second pass, forward and backward; only a --method that reads them has them collected. The
    text is CPython's own sources (training side of the bundled split) unless --text or --dataset is given.

    Work is saved to OUT.partial every two minutes. Interrupted, even killed, the same command goes on from there.

    \b
    lowkey-prune calibrate  demo/model demo.stats.safetensors
    lowkey-prune calibrate  demo/model all.safetensors --text 'src/**/*.py' --tokens 65536 --method loss-aware
    lowkey-prune calibrate  demo/model part1.safetensors --text data.jsonl --field body --shard 1/4
    """
    needed = {name for method in methods or () for name in criterion_named(method).statistics}
    refuse_existing(out, overwrite)
    source = CalibrationText(text, field, dataset, split, tokens, window_length, seed)
    numbers = shard_numbers(shard)
    where = device_named(device)
    checkpoint = open_checkpoint(src)
    names = names_for(needed)
    windows, origin = draw(checkpoint, source, numbers)
    plan = [
        *shape_lines(checkpoint.spec),
        *calibration_lines(checkpoint.spec, names, windows, where),
        disk_line([("the statistics", statistics_bytes(checkpoint.spec, names))], out),
    ]
    tell(plan, dry_run=dry_run)
    if dry_run:
        return
    with err_console.status("loading the checkpoint"):
        model = checkpoint.load(device=where)
    statistics = run_calibration(checkpoint, model, windows, origin, needed, out, overwrite=overwrite)
    out_console.print(f"{out}: {statistics.tokens:,} tokens", highlight=False, soft_wrap=True)


def tell(plan: Iterable[str], *, dry_run: bool) -> None:
    """Show what is going to be done: the result of a dry run, a message before anything else."""
    console = out_console if dry_run else err_console
    for line in plan:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def draw(
    checkpoint: Checkpoint, source: CalibrationText, shard: tuple[int, int] = (1, 1)
) -> tuple[Tensor, Origin]:
    """The windows of one shard, int64 `[count, length]`, and where they came from."""
    with err_console.status("reading text"):
        windows, origin = source.draw(checkpoint)
    return (windows, origin) if shard == (1, 1) else take_shard(windows, origin, *shard)


def run_calibration(
    checkpoint: Checkpoint,
    model: Model,
    windows: Tensor,
    origin: Origin,
    needed: Collection[StatisticName],
    out: Path,
    *,
    overwrite: bool,
) -> Statistics:
    """Collect and save statistics, going on from what an interrupted run left unless `overwrite` is given."""
    partial = out.with_name(f"{out.name}.partial")
    if overwrite:
        partial.unlink(missing_ok=True)
    passes = 2 if set(needed) & set(GRADIENTS) else 1
    try:
        with tokens_bar(err_console, "calibrating", passes * windows.numel()) as advance:
            statistics = collect(
                model, windows, origin, checkpoint.sha256, needed=needed, advance=advance, partial=partial
            )
    except KeyboardInterrupt:
        if partial.exists():
            err_console.print(f"the same command goes on from {partial}", soft_wrap=True, markup=False)
        raise
    save_statistics(statistics, out)
    partial.unlink(missing_ok=True)
    return statistics
