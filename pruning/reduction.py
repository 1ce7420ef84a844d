"""Checkpoint in, reduced checkpoint out: surgery, provenance, and the check that the result loads."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import msgspec

from lowkey.files import Found, check_new_directory, refuse_link
from lowkey.publishing import new_directory, write_json
from modeling.checkpoint import REDUCTION, Checkpoint, open_checkpoint
from modeling.model import Model
from modeling.spec import ModelSpec
from pruning.budget import Budget
from pruning.errors import PruningError
from pruning.export import check_written
from pruning.selection import Selection
from pruning.statistics import Statistics
from pruning.surgery import Export, check_runs, write_reduced
from pruning.versions import versions

FORMAT = 1
"""Version of the form of `state_reduction.json`."""


class _Source(TypedDict):
    name: str
    sha256: str
    d_k: list[int]
    state_bytes: int


class _Origin(TypedDict):
    text: str
    text_sha256: str
    windows: int
    window_length: int
    seed: int


class _Calibration(TypedDict):
    tokens: int
    origins: list[_Origin]


class _Measured(TypedDict):
    perplexity: float
    tokens: NotRequired[int]


class _Evaluation(TypedDict):
    text: str
    dense: _Measured
    reduced: _Measured


class _Around(TypedDict):
    text: str
    tokens: int
    before: _Measured
    after: _Measured


class _Settings(TypedDict):
    train: str


class _Recovery(TypedDict):
    tokens: int
    settings: _Settings
    evaluation: _Around


class _Record(TypedDict):
    """What this package reads of `state_reduction.json`."""

    source: _Source
    method: str
    seed: int
    export: NotRequired[Export]
    d_k: NotRequired[list[int]]
    calibration: _Calibration | None
    evaluation: _Evaluation | None
    recovery: NotRequired[_Recovery]


def record_of(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The checkpoint's `state_reduction.json`, or None for a dense one.

    Raises:
        PruningError: it is of another format, or not what `lowkey-prune` writes.
    """
    record, file = checkpoint.reduction, checkpoint.path / REDUCTION
    if record is None:
        return None
    if record.get("format") != FORMAT:
        raise PruningError(f"{file} has format {record.get('format')!r}; this version reads {FORMAT}")
    try:
        read = msgspec.convert(record, _Record)
    except msgspec.ValidationError as e:
        raise PruningError(f"{file} is not what lowkey-prune writes: {e}") from e
    layers = len(checkpoint.spec.linear_layers)
    for name, d_k in (("source.d_k", read["source"]["d_k"]), ("d_k", read.get("d_k"))):
        if d_k is not None and (len(d_k) != layers or min(d_k) < 1):
            raise PruningError(f"{file}: {name}={d_k} must be {layers} positive numbers, one a layer")
    if is_masked(record):
        if "d_k" not in read:
            raise PruningError(f"{file} has no d_k, which says how many channels of a head are not masked")
        if read["source"]["d_k"] != list(checkpoint.spec.d_k):
            raise PruningError(
                f"{file}: source.d_k={read['source']['d_k']} must be the d_k of the config, "
                f"{list(checkpoint.spec.d_k)}, where export='masked'"
            )
    return record


def is_masked(record: Mapping[str, Any]) -> bool:
    """Whether `state_reduction.json` is of a checkpoint whose removed channels are zeros that still take their room.
    Records from before there were two forms do not say, and are of sliced ones."""
    return record.get("export") == "masked"


@dataclass(frozen=True)
class Provenance:
    """How a selection was made."""

    method: str
    seed: int
    statistics: Statistics | None = None
    """What the method read; None for a method that reads none."""
    budget: Budget | None = None
    """How the state was spent over the layers; None where all of them were given the same width."""


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
    evaluate: Callable[[Model], dict[str, object]] | None = None,
) -> ModelSpec:
    """Write the reduced checkpoint to `out`, which appears only once it is whole and has been run.

    Args:
        replaces: what `out` may replace, as `check_output` found it before any work.
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
        check_written(checkpoint, directory, selection.cuts if export == "sliced" else ())
        check_runs(directory, spec, checkpoint.source)
        record = reduction_json(checkpoint, selection, provenance, spec, export)
        if evaluate is not None:
            record["evaluation"] = evaluate(open_checkpoint(directory).load())
        write_json(directory / REDUCTION, record)
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
