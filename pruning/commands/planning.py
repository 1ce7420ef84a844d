"""What a calibration of `calibrate` or `prune` takes, whether the whole model is in memory for it, and what it goes on
from."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.model import Model
from pruning.calibration import Origin
from pruning.collection import check_goes_on
from pruning.commands.console import err_console
from pruning.criteria import CRITERIA
from pruning.errors import PruningError
from pruning.estimate import calibration_lines, calibration_seconds
from pruning.finite import check_finite
from pruning.gradients import need_gradients
from pruning.memory import (
    Memory,
    check_fits,
    expert_dtype,
    fits,
    statistics_bytes,
    streaming_memory,
    whole_memory,
)
from pruning.progress import Busy
from pruning.statistics import StatisticName, load_unfinished, shapes


@dataclass(frozen=True)
class Calibration:
    """A calibration on one machine that is going to be run."""

    checkpoint: Checkpoint
    names: tuple[StatisticName, ...]
    windows: Tensor
    device: torch.device
    streamed: bool
    """Whether one layer is in memory at a time."""
    reading: float | None
    """Seconds that reading all weights has taken; None where there are none."""
    begun: Path | None = None
    """The file that it goes on from, if there is one."""

    @property
    def memory(self) -> Memory:
        if self.streamed:
            return streaming_memory(self.checkpoint, *self.windows.shape)
        return whole_memory(self.checkpoint.spec, self.names, self.windows.shape[1])

    def lines(self) -> Iterator[str]:
        """What it does and the memory that it takes."""
        return calibration_lines(self.names, self.windows, self.memory)

    def times(self) -> list[tuple[str, float]]:
        """Seconds of its parts, with their names."""
        experts = expert_dtype(self.checkpoint) if self.streamed else torch.float32
        seconds = calibration_seconds(self.checkpoint.spec, self.names, self.windows, self.device, experts)
        if not self.streamed or self.reading is None:
            return [("calibration", seconds)]
        # Once for their hash, and once to run them.
        return [("calibration", seconds), ("reading the weights", 2 * self.reading)]

    def sizes(self) -> list[tuple[str, int]]:
        """Bytes that it writes, with what they are."""
        size = statistics_bytes(self.checkpoint.spec, self.names)
        # The progress before is there until the new one is whole.
        return [("the statistics", size), ("its progress until then", 2 * (size + self.memory.hidden))]

    def check_fits(self) -> None:
        """Raises DoesNotFitError unless there is memory for it; for gradients `check_gradients` has looked."""
        if self.streamed:
            what = "calibration with one layer in memory at a time"
            instead = "fewer tokens, or shares of them (calibrate --shard i/n, then merge)"
            check_fits(self.memory, self.device, what, instead)
        elif self.begun is not None and not need_gradients(self.names):
            what = f"calibration with the whole model in memory, which {self.begun} is of,"
            check_fits(self.memory, self.device, what, "start anew with --overwrite, one layer at a time")


def check_tensors(checkpoint: Checkpoint, *, dry_run: bool) -> None:
    """`Checkpoint.check_tensors`, but for a dry run of weights that are not here: their sizes are in the config."""
    if checkpoint.has_weights or not dry_run:
        checkpoint.check_tensors()


def read_weights(checkpoint: Checkpoint) -> float | None:
    """Read all weights, which must be finite. Returns the seconds that it took; None where there are no weights."""
    if not checkpoint.has_weights:
        return None
    began = time.perf_counter()
    with Busy(err_console, "reading the weights"):
        check_finite(checkpoint)
    return time.perf_counter() - began


def notes(checkpoint: Checkpoint) -> Iterator[str]:
    """What a plan is without, for a checkpoint whose weights are not here."""
    if not checkpoint.has_weights:
        yield (
            f"note: no weights in {checkpoint.path}: sizes are from config.json, and the time is without reading them"
        )


def load(checkpoint: Checkpoint, device: torch.device) -> Model:
    """The whole model."""
    with Busy(err_console, "loading the checkpoint"):
        return checkpoint.load(device=device)


def without_gradients() -> str:
    """The criteria whose statistics a model gives that is not in memory as a whole, in words."""
    return ", ".join(c.name for c in CRITERIA.values() if c.statistics and not need_gradients(c.statistics))


def check_gradients(
    checkpoint: Checkpoint,
    names: tuple[StatisticName, ...],
    length: int,
    device: torch.device,
    *,
    stream_layers: bool,
) -> None:
    """Raises PruningError unless there is memory for the gradients in `names`, which are of the whole model."""
    instead = f"a criterion without gradients: {without_gradients()}"
    if stream_layers:
        raise PruningError(f"stream_layers: gradients are of the whole model; take {instead}")
    what = "calibration with gradients, which are of the whole model,"
    check_fits(whole_memory(checkpoint.spec, names, length), device, what, instead)


def plan_calibration(
    checkpoint: Checkpoint,
    names: tuple[StatisticName, ...],
    windows: Tensor,
    origin: Origin,
    device: torch.device,
    out: Path,
    reading: float | None,
    *,
    whole: bool = False,
    stream_layers: bool,
    overwrite: bool,
) -> Calibration:
    """A calibration into `out` on this machine: with the whole model in memory where that fits, or as an interrupted
    one has begun.

    Args:
        whole: whether the whole model is in memory anyhow.

    Raises:
        PruningError: what an interrupted one left is of another calibration, and `overwrite` is off; or of none.
    """
    file = unfinished_of(out)
    left = load_unfinished(file) if file.exists() else None
    if overwrite:
        left = None
    if stream_layers:
        streamed = True
    elif whole or need_gradients(names):
        streamed = False
    elif left is not None:
        streamed = "layer" in left[1]
    else:
        streamed = not fits(whole_memory(checkpoint.spec, names, windows.shape[1]), device)
    if left is not None and checkpoint.has_weights:
        with Busy(err_console, "hashing the weights"):
            sha256 = checkpoint.sha256
        check_goes_on(file, *left, sha256, origin, shapes(checkpoint.spec, names), streamed=streamed)
    return Calibration(checkpoint, names, windows, device, streamed, reading, None if left is None else file)


def unfinished_of(out: Path) -> Path:
    """The file in which a calibration or a sweep into `out` keeps its progress."""
    return out.with_name(f"{out.name}.partial")
