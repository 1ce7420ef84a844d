"""Options that several commands share, and what they stand for."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from modeling.checkpoint import Checkpoint, open_checkpoint
from modeling.spec import ModelSpec
from pruning.budget import DEFAULT_ALIGN, aligned_widths, parse_bytes, widths_for_bytes
from pruning.calibration import WINDOW, Encoder, Origin, Text, bundled_text, draw_windows
from pruning.corpus import Split
from pruning.errors import PruningError
from pruning.selection import widths_for_ratio, widths_to_keep
from pruning.sources import DEFAULT_FIELD, dataset_text, read_text
from pruning.views import width

DEFAULT_TOKENS = 16 * WINDOW
DEFAULT_SPLIT = "train"


def _not_nothing(path: str) -> Path:
    """An empty name would be the working directory: it comes from a shell variable that is not set."""
    if not path:
        raise typer.BadParameter("'' names nothing; give a file, a folder or a glob")
    return Path(path)


Source = Annotated[
    str, typer.Argument(help="Checkpoint directory, or hub id (org/name[@revision]).", metavar="SRC")
]
TextFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--text",
        parser=_not_nothing,
        metavar="PATH",
        help="Text file, folder, glob or .jsonl file, gzipped (.gz) or not; may be given several times. A file is one "
        "document.",
    ),
]
Field = Annotated[
    str | None,
    typer.Option(
        help=f"Field of the .jsonl lines or data set records that is the text (default {DEFAULT_FIELD}).",
        show_default=False,
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="Hugging Face data set instead of --text: org/name[:subset][@revision], streamed; or a local folder."
    ),
]
DatasetSplit = Annotated[
    str | None,
    typer.Option("--split", help=f"Split of the data set (default {DEFAULT_SPLIT}).", show_default=False),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method", help="Also collect what this method reads (gradients); may be given several times."
    ),
]
Tokens = Annotated[
    int | None,
    typer.Option(
        help=f"Calibration tokens, rounded up to whole windows (default {DEFAULT_TOKENS}).",
        show_default=False,
    ),
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
        help="Spend the same total state where it hurts least; stock loaders refuse the result.",
    ),
]
Heldout = Annotated[
    list[Path] | None,
    typer.Option("--heldout", help="UTF-8 file of held-out text, one document; may be repeated."),
]
HeldoutTokens = Annotated[
    int, typer.Option(help="Held-out tokens, from the front of the text; 0 for all of it.", min=0)
]
Seed = Annotated[int, typer.Option(help="Seed of the calibration draw and of the random method.", min=0)]
Device = Annotated[str, typer.Option(help="Where the model runs: cpu, cuda or cuda:N.")]
StreamLayers = Annotated[
    bool,
    typer.Option(
        "--stream-layers",
        help="Calibrate with one layer in memory at a time, as is done anyway where the whole model does not fit.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done and what it takes, and write nothing.")
]


@dataclass(frozen=True)
class CalibrationText:
    """The text that a command reads, as its options say; None stands for the default."""

    files: list[Path] | None
    field: str | None
    dataset: str | None
    split: str | None
    tokens: int | None
    window_length: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.files and self.dataset is not None:
            raise PruningError("give --text or --dataset, not both")
        if self.field is not None and not self.files and self.dataset is None:
            raise PruningError(
                f"field={self.field!r} is for --text FILE.jsonl and --dataset; neither is given"
            )
        if self.split is not None and self.dataset is None:
            raise PruningError(f"split={self.split!r} is for --dataset, which is not given")
        for name, value in (("tokens", self.tokens), ("window_length", self.window_length)):
            if value is not None and value < 1:
                raise PruningError(f"{name}={value} must be at least 1")

    @property
    def given(self) -> bool:
        """Whether any of these options but the seed was given."""
        return any(
            option not in (None, [])
            for option in (self.files, self.field, self.dataset, self.tokens, self.window_length)
        )

    @property
    def length(self) -> int:
        """How many tokens a window has."""
        return WINDOW if self.window_length is None else self.window_length

    @property
    def count(self) -> int:
        """How many windows to draw."""
        return -(-(DEFAULT_TOKENS if self.tokens is None else self.tokens) // self.length)

    def read(self, tokens: int) -> Text:
        """The text: all of the files, or as much of the data set as is plenty for `tokens`."""
        if self.dataset is None:
            return text_of(self.files, "train", self.field)
        return dataset_text(
            self.dataset,
            split=self.split or DEFAULT_SPLIT,
            field=self.field,
            tokens=tokens,
            seed=self.seed,
        )

    def draw(self, encoder: Encoder) -> tuple[Tensor, Origin]:
        """Token windows; see `draw_windows`."""
        text = self.read(self.count * self.length)
        return draw_windows(encoder, text, count=self.count, length=self.length, seed=self.seed)


def shard_numbers(shard: str) -> tuple[int, int]:
    """`i/n` -> (i, n). Raises PruningError for anything else."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise PruningError(f"shard={shard!r} must be i/n with i from 1 to n, like 2/4")
    return int(match[1]), int(match[2])


def uniform_widths(
    spec: ModelSpec, keep: int | None, ratio: float | None, state_bytes: str | None, align: int
) -> tuple[tuple[int, ...], int]:
    """Widths without --per-layer, and the bytes of state that the options allow.

    Raises:
        PruningError: not exactly one of `keep`, `ratio` and `state_bytes` is given, it can't be met, or it leaves all
            channels.
    """
    if sum(option is not None for option in (keep, ratio, state_bytes)) != 1:
        raise PruningError(
            "give exactly one of --keep (channels to keep), --ratio (share to remove) and --state-bytes"
        )
    aligned_widths(min(spec.d_k), align)
    if state_bytes is not None:
        limit = parse_bytes(state_bytes)
        widths = widths_for_bytes(spec, limit, align)
    else:
        if keep is not None:
            widths = widths_to_keep(spec, keep)
        else:
            assert ratio is not None
            widths = widths_for_ratio(spec, ratio)
        limit = spec.with_d_k(widths).state_bytes(0)
    if limit >= spec.state_bytes(0):
        given = (
            f"keep={keep}"
            if keep is not None
            else f"ratio={ratio}"
            if ratio is not None
            else f"{state_bytes=}"
        )
        raise PruningError(
            f"{given} removes nothing: d_k is {width(spec.d_k)} and the state of one request {spec.state_bytes(0):,} "
            "bytes as it is; ask for less"
        )
    return widths, limit


def named_files(text: list[Path] | None) -> list[Path]:
    """What `--text` names as single files: these are no outputs, while results may lie in a folder of text."""
    return [file for file in text or () if not file.is_dir()]


def text_of(files: list[Path] | None, split: Split, field: str | None = None) -> Text:
    """The files, folders and globs, or one side of the bundled text."""
    return read_text(files, field) if files else bundled_text(split)


def checkpoint_named(source: str) -> Checkpoint:
    """A checkpoint directory or hub id, opened. Raises PruningError if it has nothing that this package works on."""
    checkpoint = open_checkpoint(source)
    check_prunable(checkpoint.spec, source)
    return checkpoint


def check_prunable(spec: ModelSpec, source: str) -> None:
    """Raises PruningError for a model, which the user calls `source`, without a layer that this package works on."""
    if not spec.linear_layers:
        raise PruningError(f"{source} has no linear-attention layer: nothing to prune")


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
