"""Checkpoint in, reduced checkpoint out: surgery, provenance, and the check that the result loads."""

import importlib.metadata
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import tokenizers
import torch

from modeling.checkpoint import REDUCTION, Checkpoint, new_directory, open_checkpoint, write_json
from modeling.model import Model
from modeling.spec import ModelSpec
from pruning.budget import Budget
from pruning.errors import PruningError
from pruning.selection import Selection
from pruning.statistics import Statistics
from pruning.surgery import check_runs, write_reduced

FORMAT = 1
"""Of `state_reduction.json`."""


@dataclass(frozen=True)
class Provenance:
    """How a selection came about."""

    method: str
    seed: int
    statistics: Statistics | None = None
    """None for a method that needs none."""
    budget: Budget | None = None
    """None where all layers were given the same width."""


def check_output(sources: Sequence[Checkpoint], out: Path, *, overwrite: bool, ours: str = REDUCTION) -> None:
    """Refuse an output that exists, before any work is done.

    Args:
        sources: what is going to be read.
        ours: the file by which an earlier result of the same command is known.

    Raises:
        PruningError: `out` exists and `overwrite` is off, or it is no such result, or it is a source.
    """
    if not out.exists():
        return
    if any(source.path.resolve().is_relative_to(out.resolve()) for source in sources):
        raise PruningError(f"out={str(out)!r} is a checkpoint to read or holds one; choose another output")
    if not overwrite:
        raise PruningError(f"out={str(out)!r} already exists; choose another output or pass --overwrite")
    if not (out / ours).exists():
        raise PruningError(
            f"out={str(out)!r} holds no {ours}, so --overwrite does not replace it; "
            "remove it yourself or choose another output"
        )


def reduce_checkpoint(
    checkpoint: Checkpoint,
    selection: Selection,
    provenance: Provenance,
    out: Path,
    *,
    overwrite: bool = False,
    evaluate: Callable[[Model], dict[str, object]] | None = None,
) -> ModelSpec:
    """Write the reduced checkpoint to `out`, which appears only once it is whole and has been run.

    Args:
        evaluate: measures the reduced model, loaded whole; what it returns goes into `state_reduction.json`.

    Returns:
        The reduced model's spec.

    Raises:
        PruningError, CheckpointError: the output is refused, or the result does not load and run.
    """
    check_output([checkpoint], out, overwrite=overwrite)
    with new_directory(out, overwrite=overwrite) as directory:
        spec = write_reduced(checkpoint, selection.cuts, directory)
        check_runs(directory, spec)
        record = reduction_json(checkpoint, selection, provenance, spec)
        if evaluate is not None:
            record["evaluation"] = evaluate(open_checkpoint(directory).load())
        write_json(directory / REDUCTION, record)
    return spec


def reduction_json(
    checkpoint: Checkpoint, selection: Selection, provenance: Provenance, spec: ModelSpec
) -> dict[str, Any]:
    """The content of `state_reduction.json`; docs/pruning.md lists the keys."""
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
            "sha256": checkpoint.sha256,
            "d_k": list(checkpoint.spec.d_k),
            "state_bytes": checkpoint.spec.state_bytes(),
        },
        "method": provenance.method,
        "seed": provenance.seed,
        "d_k": list(spec.d_k),
        "state_bytes": spec.state_bytes(),
        "stock_loaders": len(set(spec.d_k)) == 1,
        "budget": None if provenance.budget is None else provenance.budget.as_json(),
        "calibration": calibration,
        "evaluation": None,
        "versions": versions(),
        "selection": selection.report,
        "rotated": selection.rotated,
        "kept_channels": [layer.tolist() for layer in selection.keep],
    }


def versions() -> dict[str, str]:
    """Versions of everything that a selection or a saved file depends on."""
    try:
        ours = importlib.metadata.version("lowkey")
    except importlib.metadata.PackageNotFoundError:
        ours = "not installed"
    return {
        "lowkey": ours,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "safetensors": safetensors.__version__,
        "tokenizers": tokenizers.__version__,
    }
