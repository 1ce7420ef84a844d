"""The file that `benchmarks/ladder/mqar.py` writes and `report` reads: recall of models that were trained for it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modeling.spec import StateDType
from pruning.json_record import read_record

KIND = "mqar"
FORMAT = 1


@dataclass(frozen=True)
class Accuracy:
    """How well the values of one number of pairs are recalled."""

    pairs: int
    queries: int
    accuracy: float
    """Share of queries where the value is the most likely token of the whole vocabulary."""
    standard_error: float
    """Binomial standard error of that share, `sqrt(p (1 - p) / queries)`."""


@dataclass(frozen=True)
class Recalled:
    """One model with its states in one dtype."""

    method: str | None
    """The method that reduced it; None for the dense model."""
    seed: int
    """Seed of the calibration questions and of the method's own draws."""
    d_k: int
    trained: bool
    """Whether it was trained on after the reduction (the dense model: on the same questions, as a control)."""
    state_dtype: StateDType
    state_bytes: int
    """Bytes of one request's state."""
    accuracy: list[Accuracy]


@dataclass(frozen=True)
class TrainingPoint:
    """One point along the training of the dense model."""

    step: int
    seconds: float
    accuracy: dict[int, float]
    """Running mean of the accuracy on the questions of each step, by number of pairs."""


@dataclass(frozen=True)
class MQARTable:
    """What `benchmarks/ladder/mqar.py` writes, after every stage."""

    kind: str
    format: int
    checkpoint: str
    sha256: str
    """Hash of the dense checkpoint's config and weights."""
    versions: dict[str, str]
    environment: dict[str, str | int]
    settings: dict[str, Any]
    """All that the figures depend on beside the device."""
    training: list[TrainingPoint]
    recalled: list[Recalled] = field(default_factory=list)


def read_mqar(path: Path) -> MQARTable:
    """Raises PruningError if the file is missing, of another format, or something else."""
    return read_record(path, MQARTable, KIND, FORMAT, "benchmarks/ladder/mqar.py")
