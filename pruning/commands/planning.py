"""What a calibration of `calibrate` or `prune` takes, and whether the whole model is in memory for it."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.model import Model
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
from pruning.statistics import StatisticName, load_unfinished


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
        if not self.streamed:
            return [("the statistics", size)]
        return [("the statistics", size), ("its progress until then", size + self.memory.hidden)]


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


def one_layer_at_a_time(
    checkpoint: Checkpoint,
    names: tuple[StatisticName, ...],
    windows: Tensor,
    device: torch.device,
    unfinished: Path,
    *,
    forced: bool,
    overwrite: bool,
) -> bool:
    """Whether to hold one layer at a time: on demand, where the whole model does not fit, and where a calibration that
    goes on from the file `unfinished` has begun so.

    Raises:
        PruningError: not even that fits, or the file `unfinished` is no calibration's.
    """
    if need_gradients(names):
        return False
    begun = not overwrite and unfinished.exists() and "layer" in load_unfinished(unfinished)[1]
    if not forced and not begun and fits(whole_memory(checkpoint.spec, names, windows.shape[1]), device):
        return False
    what = "calibration with one layer in memory at a time"
    check_fits(
        streaming_memory(checkpoint, *windows.shape),
        device,
        what,
        "fewer tokens, or shares of them (calibrate --shard i/n, then merge)",
    )
    return True
