"""What `lowkey-prune prune` is going to do, line by line."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lowkey.words import counted
from modeling.checkpoint import Checkpoint
from pruning import views
from pruning.calibration import WINDOW
from pruning.commands.planning import Calibration, notes
from pruning.commands.reconstructing import PlannedReconstruction
from pruning.companions import Companions
from pruning.criteria import Criterion
from pruning.estimate import (
    budget_line,
    disk_lines,
    evaluation_seconds,
    largest_file_bytes,
    reduced_bytes,
    reduction_lines,
    shape_lines,
    time_line,
)
from pruning.evaluation import DEFAULT_TOKENS
from pruning.loaders import uneven, warnings
from pruning.surgery import Export


def plan_reduction(
    checkpoint: Checkpoint,
    criterion: Criterion,
    widths: Sequence[int],
    out: Path,
    *,
    passes: int,
    limit: int,
    windows: Tensor | None,
    calibration: Calibration | None,
    reconstruction: PlannedReconstruction | None,
    evaluating: bool,
    export: Export,
    device: torch.device,
    dry_run: bool,
) -> Iterator[str]:
    """What `prune` is going to do, line by line."""
    spec = checkpoint.spec
    yield from shape_lines(spec)
    written = [("the checkpoint", reduced_bytes(checkpoint, widths if export == "sliced" else spec.d_k))]
    times: list[tuple[str, float]] = []
    if calibration is not None:
        yield from calibration.lines()
        times += calibration.times()
        written += calibration.sizes()
    if passes and windows is not None:
        yield budget_line(passes, limit, windows)
        times.append(("widths", passes * evaluation_seconds(spec, windows.numel(), windows.shape[1], device)))
        if export == "sliced":
            yield f"note: where {uneven(spec)} (docs/hybrids.md)"
    elif export == "sliced":
        yield from reduction_lines(spec, widths)
        yield from warnings(checkpoint.config, spec, spec.with_d_k(tuple(widths)))
    if export == "masked":
        kept = "the chosen widths" if passes else f"{views.width(widths)} of {views.width(spec.d_k)} channels"
        yield (
            f"export masked: {kept} of each head are kept and the others are zero; shapes, config and the state of "
            f"{spec.state_bytes(0):,} bytes per request stay: no memory is saved"
        )
    if reconstruction is not None:
        yield from reconstruction.lines()
        times += reconstruction.times()
        # A file with fitted tensors takes the old one's place once it is whole.
        size = min(written[0][1], largest_file_bytes(checkpoint))
        written.append(("the checkpoint's largest file, which is written twice", size))
    if evaluating:
        yield f"evaluation: {counted(DEFAULT_TOKENS, 'held-out token')}, before and after"
        reduced = spec.with_d_k(tuple(widths)) if export == "sliced" else spec
        # The source runs twice: for its perplexity, and beside the model that is compared with it.
        models = (spec, reduced, spec)
        seconds = [evaluation_seconds(s, DEFAULT_TOKENS, WINDOW, device) for s in models]
        times.append(("evaluation", sum(seconds)))
    if times:
        yield time_line(times, device)
    yield from notes(checkpoint)
    yield from disk_lines(written, out, dry_run=dry_run)
    yield from Companions(checkpoint).notes()
