"""What a report is drawn from: each input is recognised by what it is, and checked before anything is drawn."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from modeling.checkpoint import REDUCTION
from pruning.companions import RECOVERY
from pruning.errors import PruningError
from pruning.evaluation.record import KIND as EVALUATION
from pruning.evaluation.record import Evaluation, read_evaluation
from pruning.mqar_table import KIND as MQAR
from pruning.mqar_table import MQARTable, read_mqar
from pruning.record import FORMAT as REDUCTION_FORMAT
from pruning.statistics import Statistics, load_statistics
from pruning.table import FORMAT as TABLE_FORMAT
from pruning.table import KIND as TABLE
from pruning.table import Table

RECOVERY_FORMAT = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Kind:
    """The field of our JSON files that says what they are."""

    kind: str | None = None


@dataclass(frozen=True)
class Budget:
    """`budget` of `state_reduction.json`."""

    state_bytes: int
    loss_rise: list[dict[int, float]]


@dataclass(frozen=True)
class Source:
    """`source` of `state_reduction.json`."""

    name: str
    sha256: str
    d_k: list[int]
    state_bytes: int | None = None
    """Bytes of one request's state in float32."""


@dataclass(frozen=True)
class Trained:
    """`recovery` of `state_reduction.json`."""

    tokens: int


@dataclass(frozen=True)
class Reduction:
    """What the report reads of `state_reduction.json`."""

    format: int
    source: Source
    method: str
    seed: int
    d_k: list[int]
    kept_channels: list[list[list[int]]]
    budget: Budget | None = None
    layers: list[int] | None = None
    """Indices of the linear-attention layers, which `d_k` and the like are of; None for the first ones."""
    rotated: bool = False
    """Whether the kept channels are mixtures of the source's channels."""
    state_bytes: int | None = None
    """Bytes of one request's state in float32."""
    recovery: Trained | None = None


@dataclass(frozen=True)
class Point:
    """One point of a recovery curve; losses in nats per token."""

    tokens: int
    train_loss: float | None
    heldout_loss: float


@dataclass(frozen=True)
class Recovery:
    """What the report reads of `recovery.json`."""

    format: int
    control: bool
    curve: list[Point]


@dataclass
class Inputs:
    """Everything that was given, by what it is; names are what the user typed."""

    tables: list[tuple[str, Table]] = field(default_factory=list)
    evaluations: list[tuple[str, Evaluation]] = field(default_factory=list)
    mqar: list[tuple[str, MQARTable]] = field(default_factory=list)
    statistics: list[tuple[str, Statistics]] = field(default_factory=list)
    reductions: list[tuple[str, Reduction]] = field(default_factory=list)
    recoveries: list[tuple[str, Recovery]] = field(default_factory=list)
    hashes: list[tuple[str, str]] = field(default_factory=list)
    """(file, sha256) of each file that was read."""


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Raises PruningError for a path that is none of the inputs, or a broken one."""
    inputs = Inputs()
    for path in paths:
        if path.is_dir():
            _read_checkpoint(path, inputs)
        elif path.suffix == ".safetensors":
            inputs.statistics.append((str(path), load_statistics(path)))
            _hash(path, inputs)
        else:
            _read_json(path, inputs)
    return inputs


def _read_checkpoint(path: Path, inputs: Inputs) -> None:
    reduction, recovery = path / REDUCTION, path / RECOVERY
    if not (reduction.exists() or recovery.exists()):
        raise PruningError(
            f"{path} holds neither {REDUCTION} nor {RECOVERY}; give checkpoints that lowkey-prune has made"
        )
    if reduction.exists():
        found = _decode(reduction, Reduction)
        _check_format(reduction, found.format, REDUCTION_FORMAT)
        inputs.reductions.append((str(path), found))
        _hash(reduction, inputs)
    if recovery.exists():
        curve = _decode(recovery, Recovery)
        _check_format(recovery, curve.format, RECOVERY_FORMAT)
        inputs.recoveries.append((str(path), curve))
        _hash(recovery, inputs)


def _read_json(path: Path, inputs: Inputs) -> None:
    kind = _decode(path, Kind).kind
    if kind == EVALUATION:
        inputs.evaluations.append((str(path), read_evaluation(path)))
    elif kind == TABLE:
        table = _decode(path, Table)
        _check_format(path, table.format, TABLE_FORMAT)
        inputs.tables.append((str(path), table))
    elif kind == MQAR:
        inputs.mqar.append((str(path), read_mqar(path)))
    else:
        raise PruningError(
            f"{path} is neither of evaluate --json nor of sweep or benchmarks/ladder/mqar.py: its kind is {kind!r}"
        )
    _hash(path, inputs)


def _decode(path: Path, as_type: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=as_type)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise PruningError(f"{path} can't be read for a report: {e}") from e


def _check_format(path: Path, found: int, expected: int) -> None:
    if found != expected:
        raise PruningError(f"{path} has format {found}; this version reads {expected}")


def _hash(path: Path, inputs: Inputs) -> None:
    with path.open("rb") as f:
        inputs.hashes.append((str(path), hashlib.file_digest(f, "sha256").hexdigest()))
