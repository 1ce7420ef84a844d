"""`state_reduction.json`, which says how a reduced checkpoint was made, as it is read."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

import msgspec

from modeling.checkpoint import REDUCTION, Checkpoint
from pruning.errors import PruningError
from pruning.surgery import Export

FORMAT = 1
"""Version of the form of `state_reduction.json`."""


class _Source(TypedDict):
    name: str
    hub_id: NotRequired[str | None]
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
