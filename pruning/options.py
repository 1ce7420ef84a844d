"""Options that several commands share, and what they stand for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from modeling.checkpoint import Checkpoint
from modeling.spec import ModelSpec
from pruning.budget import DEFAULT_ALIGN, aligned_widths, parse_bytes, widths_for_bytes
from pruning.calibration import WINDOW, Encoder, Origin, Text, bundled_text, draw_windows, text_files
from pruning.corpus import Split
from pruning.errors import PruningError
from pruning.selection import widths_for_ratio, widths_to_keep

DEFAULT_WINDOWS = 16

Source = Annotated[
    str, typer.Argument(help="Checkpoint directory, or hub id (org/name[@revision]).", metavar="SRC")
]
TextFiles = Annotated[
    list[Path] | None,
    typer.Option("--text", help="UTF-8 text file, one document; may be given several times."),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method", help="Also collect what this method reads (gradients); may be given several times."
    ),
]
WindowCount = Annotated[
    int | None,
    typer.Option("--windows", help=f"Calibration windows (default {DEFAULT_WINDOWS}).", show_default=False),
]
WindowLength = Annotated[
    int | None,
    typer.Option("--window-length", help=f"Tokens per window (default {WINDOW}).", show_default=False),
]
StateBytes = Annotated[
    str | None,
    typer.Option(help="State of one request, instead of --keep: the largest d_k within it (13MB, 430080)."),
]
Align = Annotated[
    int | None,
    typer.Option(
        help="Widths chosen by --state-bytes and --per-layer are multiples of this even number "
        f"(default {DEFAULT_ALIGN}).",
        show_default=False,
    ),
]
PerLayer = Annotated[
    bool,
    typer.Option(
        "--per-layer",
        help="Spend the same total state where it hurts least. Lowkey runs the result; stock loaders refuse it.",
    ),
]
Seed = Annotated[int, typer.Option(help="Of the calibration draw and of the random method.", min=0)]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]


@dataclass(frozen=True)
class CalibrationText:
    """The text that a command reads, as its options say; None stands for the default."""

    files: list[Path] | None
    windows: int | None
    window_length: int | None
    seed: int

    @property
    def given(self) -> bool:
        """Whether any option but the seed was given."""
        return bool(self.files) or self.windows is not None or self.window_length is not None

    def draw(self, checkpoint: Checkpoint) -> tuple[Tensor, Origin]:
        """Token windows in the checkpoint's own tokens; see `draw_windows`."""
        return draw_windows(
            Encoder(checkpoint),
            text_of(self.files, "train"),
            count=DEFAULT_WINDOWS if self.windows is None else self.windows,
            length=WINDOW if self.window_length is None else self.window_length,
            seed=self.seed,
        )


def uniform_widths(
    spec: ModelSpec, keep: int | None, ratio: float | None, state_bytes: str | None, align: int
) -> tuple[tuple[int, ...], int]:
    """Widths without --per-layer, and the bytes of state that the options allow.

    Raises:
        PruningError: not exactly one of `keep`, `ratio` and `state_bytes` is given, or it can't be met.
    """
    if sum(option is not None for option in (keep, ratio, state_bytes)) != 1:
        raise PruningError(
            "give exactly one of --keep (channels to keep), --ratio (share to remove) and --state-bytes"
        )
    aligned_widths(min(spec.d_k), align)
    if state_bytes is not None:
        limit = parse_bytes(state_bytes)
        return widths_for_bytes(spec, limit, align), limit
    if keep is not None:
        widths = widths_to_keep(spec, keep)
    else:
        assert ratio is not None
        widths = widths_for_ratio(spec, ratio)
    return widths, spec.with_d_k(widths).state_bytes()


def text_of(files: list[Path] | None, split: Split) -> Text:
    """The files, or one side of the bundled text."""
    return text_files(files) if files else bundled_text(split)


def device_named(name: str) -> torch.device:
    """Raises PruningError for a device that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise PruningError(f"device={name!r} is no device; give cpu, cuda or cuda:N") from e
    if device.type not in ("cpu", "cuda") or (
        device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()
    ):
        raise PruningError(f"device={name!r} is not available here; give cpu")
    return device


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raises PruningError for a file that is there and may not be replaced."""
    if out.exists() and not overwrite:
        raise PruningError(f"out={str(out)!r} already exists; choose another file or pass --overwrite")
