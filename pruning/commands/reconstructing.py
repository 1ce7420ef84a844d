"""`--reconstruct` of `lowkey-prune prune`: its options, what it takes, and the work itself."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import typer
from torch import Tensor

from lowkey.words import counted, in_units
from modeling.checkpoint import Checkpoint
from pruning.calibration import Encoder, Origin
from pruning.commands.calibrate import draw
from pruning.commands.console import err_console
from pruning.errors import PruningError
from pruning.estimate import reconstruction_seconds
from pruning.fused import training_rule
from pruning.memory import Memory, check_fits, fits, reconstruction_memory
from pruning.options import CalibrationText
from pruning.progress import tokens_bar
from pruning.reconstruction import ReconstructionSettings, reconstruct, tokens_to_run
from pruning.reduction import Fitted
from pruning.surgery import Export

DEFAULT_TOKENS = 65_536

Reconstruct = Annotated[
    bool,
    typer.Option(
        "--reconstruct",
        help="Fit each layer, once its channels are removed, to what the source's layer gives on the calibration text.",
    ),
]
ReconstructTokens = Annotated[
    int | None,
    typer.Option(
        help=f"Tokens for --reconstruct, rounded up to whole windows (default {DEFAULT_TOKENS}).",
        show_default=False,
    ),
]
ReconstructSteps = Annotated[
    int | None,
    typer.Option(
        help=f"Steps for each layer (default {ReconstructionSettings.steps}).",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class ReconstructionOptions:
    """The options, as they were given; None stands for the default."""

    wanted: bool
    tokens: int | None
    steps: int | None
    seed: int

    def check(self, export: Export) -> None:
        """Raises PruningError for options that can't be meant."""
        for name, value in (("reconstruct_tokens", self.tokens), ("reconstruct_steps", self.steps)):
            if value is not None and not self.wanted:
                raise PruningError(f"{name}={value} is for --reconstruct, which is not given")
            if value is not None and value < 1:
                raise PruningError(f"{name}={value} must be at least 1")
        if self.wanted and export == "masked":
            raise PruningError(
                "export='masked' keeps channels of zeros, which --reconstruct would fill again; drop one of the two"
            )

    def plan(
        self, checkpoint: Checkpoint, encoder: Encoder, source: CalibrationText, device: torch.device
    ) -> "PlannedReconstruction":
        """Draw the windows."""
        source = replace(source, tokens=DEFAULT_TOKENS if self.tokens is None else self.tokens)
        if source.count < 2:
            raise PruningError(
                f"reconstruct_tokens={source.tokens} gives 1 window of {counted(source.length, 'token')}; at least 2 "
                "are needed: one is fitted to, and one measures"
            )
        try:
            windows, origin = draw(encoder, source)
        except PruningError as e:  # it speaks of windows, which calibration has others of
            raise PruningError(f"reconstruct_tokens={source.tokens}: {e}") from e
        settings = ReconstructionSettings(seed=self.seed)
        if self.steps is not None:
            settings = replace(settings, steps=self.steps)
        return PlannedReconstruction(checkpoint, windows, origin, settings, device)


@dataclass(frozen=True)
class PlannedReconstruction:
    """A reconstruction on one machine that is going to be run."""

    checkpoint: Checkpoint
    """The dense one."""
    windows: Tensor
    origin: Origin
    settings: ReconstructionSettings
    device: torch.device

    @property
    def hidden_device(self) -> torch.device:
        """Where the hidden states are: beside the layers, unless there is room on the CPU alone."""
        return self.device if fits(self._memory(self.device), self.device) else torch.device("cpu")

    @property
    def memory(self) -> Memory:
        return self._memory(self.hidden_device)

    def _memory(self, hidden_device: torch.device) -> Memory:
        batch = self.settings.batch
        return reconstruction_memory(
            self.checkpoint, self.windows, batch, self.device, hidden_device=hidden_device
        )

    def check_fits(self) -> None:
        """Raises DoesNotFitError unless there is memory for it."""
        check_fits(self.memory, self.device, "--reconstruct", "fewer --reconstruct-tokens")

    def lines(self) -> Iterator[str]:
        """What it does and the memory that it takes."""
        count, length = self.windows.shape
        s, memory = self.settings, self.memory
        yield (
            f"reconstruction: {counted(self.windows.numel(), 'token')}, {counted(count, 'window')} of {length}; two "
            f"passes forward, and for each layer {counted(s.steps, 'step')} of {counted(s.batch, 'window')}, one layer "
            "at a time"
        )
        states = 2 * 4 * self.windows.numel() * self.checkpoint.spec.hidden_size
        yield (
            f"memory of it: about {in_units(memory.total)} (layers, gradients and moments "
            f"{in_units(memory.weights + memory.training)}, hidden states {in_units(states)} on {self.hidden_device})"
        )

    def times(self) -> list[tuple[str, float]]:
        """Seconds that it takes, with its name."""
        count, length = self.windows.shape
        s, spec = self.settings, self.checkpoint.spec
        return [
            (
                "reconstruction",
                reconstruction_seconds(spec, 2 * count, s.steps * s.batch, length, self.device),
            )
        ]

    def run(self, reduced: Checkpoint) -> Fitted:
        """Fit the layers of `reduced`, which was cut from the dense checkpoint.

        Returns:
            The tensors that change, by name, and what `state_reduction.json` says about it.
        """
        tokens = tokens_to_run(self.checkpoint.spec, self.windows, self.settings)
        with tokens_bar(err_console, "fitting layer by layer", tokens) as advance:
            found = reconstruct(
                self.checkpoint,
                reduced,
                self.windows,
                self.settings,
                device=self.device,
                hidden_device=self.hidden_device,
                rule=training_rule(self.device),
                advance=advance,
            )
        return found.tensors, found.as_json(self.origin, self.settings)
