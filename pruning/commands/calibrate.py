"""`lowkey-prune calibrate`: text -> statistics file."""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer
from torch import Tensor

from modeling.checkpoint import Checkpoint, open_checkpoint
from modeling.model import Model
from pruning.calibration import Origin
from pruning.commands.console import err_console, out_console
from pruning.criteria import criterion_named
from pruning.gradients import GRADIENTS
from pruning.options import (
    CalibrationText,
    Device,
    Methods,
    Overwrite,
    Seed,
    Source,
    TextFiles,
    WindowCount,
    WindowLength,
    device_named,
    refuse_existing,
)
from pruning.progress import tokens_bar
from pruning.statistics import StatisticName, Statistics, collect, save_statistics


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
    statistics = run_calibration(open_checkpoint(src), needed, source, device)
    save_statistics(statistics, out)
    out_console.print(f"{out}: {statistics.tokens:,} tokens", highlight=False, soft_wrap=True)


def run_calibration(
    checkpoint: Checkpoint, needed: Collection[StatisticName], source: CalibrationText, device: str
) -> Statistics:
    ids, origin, model = windows_and_model(checkpoint, source, device)
    passes = 2 if set(needed) & set(GRADIENTS) else 1
    with tokens_bar(err_console, "calibrating", passes * ids.numel()) as advance:
        return collect(model, ids, origin, checkpoint.sha256, needed=needed, advance=advance)


def windows_and_model(
    checkpoint: Checkpoint, source: CalibrationText, device: str
) -> tuple[Tensor, Origin, Model]:
    target = device_named(device)
    with err_console.status("reading text"):
        ids, origin = source.draw(checkpoint)
    with err_console.status("loading the checkpoint"):
        return ids, origin, checkpoint.load(device=target)
