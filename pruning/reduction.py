"""Checkpoint in, reduced checkpoint out: surgery, provenance, and the check that the result loads."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowkey.files import Found, check_new_directory, refuse_link
from lowkey.publishing import new_directory, write_json
from modeling.checkpoint import REDUCTION, Checkpoint, open_checkpoint
from modeling.model import Model
from modeling.spec import ModelSpec
from pruning.budget import Budget
from pruning.card import write_card
from pruning.errors import PruningError
from pruning.export import check_written
from pruning.record import FORMAT
from pruning.selection import Selection
from pruning.statistics import Statistics
from pruning.surgery import Export, check_runs, replace_tensors, write_reduced
from pruning.versions import versions


@dataclass(frozen=True)
class Provenance:
    """How a selection was made."""

    method: str
    seed: int
    statistics: Statistics | None = None
    """What the method read; None for a method that reads none."""
    budget: Budget | None = None
    """How the state was spent over the layers; None where all of them were given the same width."""


Fitted = tuple[Mapping[str, Tensor], dict[str, Any]]
"""What fitting a reduced checkpoint gives: the tensors that change, by name, and what `state_reduction.json` says about
it."""


def check_output(
    sources: Sequence[Checkpoint], out: Path, *, overwrite: bool, ours: str = REDUCTION
) -> Found | None:
    """Refuse an output that exists or can't be written, before any work is done.

    Args:
        sources: Checkpoints that are going to be read.
        ours: File by which an earlier result of the same command is known.

    Returns:
        What is there and may be replaced, or None if nothing is.

    Raises:
        PruningError: It is one of the sources, or holds one.
        OutputError: It exists and `overwrite` is off, it is no such result or a link, or it can't be written.
    """
    refuse_link(out, "out")
    there = os.path.exists(out)
    if there and any(source.path.resolve().is_relative_to(out.resolve()) for source in sources):
        raise PruningError(f"out={str(out)!r} is a checkpoint to read or holds one; choose another output")
    return check_new_directory(out, "out", overwrite=overwrite, holds=ours)


def reduce_checkpoint(
    checkpoint: Checkpoint,
    selection: Selection,
    provenance: Provenance,
    out: Path,
    *,
    export: Export = "sliced",
    replaces: Found | None = None,
    fit: Callable[[Checkpoint], Fitted] | None = None,
    evaluate: Callable[[Model], dict[str, object]] | None = None,
) -> ModelSpec:
    """Write the reduced checkpoint to `out`, which appears only once it is whole and has been run.

    Args:
        replaces: what `out` may replace, as `check_output` found it before any work.
        fit: fits layers of the reduced checkpoint.
        evaluate: measures the reduced model, loaded whole; what it returns goes into `state_reduction.json`.

    Returns:
        The spec of the model that was written: for the masked form that of the source.

    Raises:
        PruningError, CheckpointError: the result does not load and run.
        OutputTakenError: something else is at `out`; the result is beside it.
        OutputError: the output can't be written.
    """
    with new_directory(out, replaces=replaces) as directory:
        spec = write_reduced(checkpoint, selection.cuts, directory, export)
        fitted = {}
        if fit is not None:
            tensors, fitted["reconstruction"] = fit(Checkpoint(directory, checkpoint.source))
            replace_tensors(directory, tensors)
            del tensors
        check_written(checkpoint, directory, selection.cuts if export == "sliced" else ())
        check_runs(directory, spec, checkpoint.source)
        record = reduction_json(checkpoint, selection, provenance, spec, export) | fitted
        if evaluate is not None:
            record["evaluation"] = evaluate(open_checkpoint(directory).load())
        write_json(directory / REDUCTION, record)
        write_card(directory, record)
    return spec


def reduction_json(
    checkpoint: Checkpoint, selection: Selection, provenance: Provenance, spec: ModelSpec, export: Export
) -> dict[str, Any]:
    """The content of `state_reduction.json`; docs/pruning.md lists the keys.

    `d_k` says how many channels of a head are kept, in both forms of export; `state_bytes` is the state of the model
    that was written, of `spec`.
    """
    calibration = None
    if provenance.statistics is not None:
        statistics = provenance.statistics
        calibration = {
            "tokens": statistics.tokens,
            "origins": [origin.as_json() for origin in statistics.origins],
        }
    return {
        "format": FORMAT,
        "source": {
            "name": checkpoint.source,
            "hub_id": checkpoint.hub_id,
            "sha256": checkpoint.sha256,
            "d_k": list(checkpoint.spec.d_k),
            "state_bytes": checkpoint.spec.state_bytes(0),
        },
        "method": provenance.method,
        "seed": provenance.seed,
        "layers": list(spec.linear_layers),
        "export": export,
        "d_k": list(selection.d_k),
        "state_bytes": spec.state_bytes(0),
        "stock_loaders": len(set(spec.d_k)) == 1,
        "budget": None if provenance.budget is None else provenance.budget.as_json(),
        "calibration": calibration,
        "evaluation": None,
        "versions": versions(),
        "selection": selection.report,
        "rotated": selection.rotated,
        "kept_channels": [cut.keep.tolist() for cut in selection.cuts],
    }
