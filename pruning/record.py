"""`state_reduction.json`, which says how a reduced checkpoint was made, as it is read."""

from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

from modeling.checkpoint import REDUCTION, Checkpoint
from modeling.families import ConfigError
from modeling.families.base import MOST, check_sizes
from pruning.errors import PruningError
from pruning.surgery import Export

FORMAT = 1
"""Version of the form of `state_reduction.json`."""
_Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A number that is computed with: no file that was written here says a larger one."""


class _Source(TypedDict):
    name: str
    hub_id: NotRequired[str | None]
    sha256: str
    d_k: list[int]
    state_bytes: _Count


class _Origin(TypedDict):
    text: str
    text_sha256: str
    windows: _Count
    window_length: _Count
    seed: int


class _Calibration(TypedDict):
    tokens: _Count
    origins: list[_Origin]


class _Measured(TypedDict):
    perplexity: float
    tokens: NotRequired[_Count]


class _Divergence(TypedDict):
    kl: float
    top1_agreement: float


class _Evaluation(TypedDict):
    text: str
    dense: _Measured
    reduced: _Measured
    divergence: NotRequired[_Divergence]


class _Around(TypedDict):
    text: str
    tokens: _Count
    before: _Measured
    after: _Measured


class _Settings(TypedDict):
    train: str


class _Recovery(TypedDict):
    tokens: _Count
    settings: _Settings
    evaluation: _Around


class _Reconstruction(TypedDict):
    tokens: _Count


class _Record(TypedDict):
    """What this package reads of `state_reduction.json`."""

    source: _Source
    method: str
    seed: int
    export: NotRequired[Export]
    d_k: NotRequired[list[int]]
    calibration: _Calibration | None
    evaluation: _Evaluation | None
    reconstruction: NotRequired[_Reconstruction]
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
        if d_k is not None and (len(d_k) != layers or not 1 <= min(d_k) <= max(d_k) <= MOST):
            raise PruningError(
                f"{file}: {name}={d_k!r:.200} must be {layers} positive numbers of at most {MOST}, one a layer"
            )
    try:
        check_sizes(checkpoint.spec.with_d_k(tuple(read["source"]["d_k"])))
    except ConfigError as e:
        raise PruningError(f"{file}: source.d_k={read['source']['d_k']!r:.200} is too wide: {e}") from e
    if is_masked(record):
        if "d_k" not in read:
            raise PruningError(f"{file} has no d_k, which says how many channels of a head are not masked")
        if read["source"]["d_k"] != list(checkpoint.spec.d_k):
            raise PruningError(
                f"{file}: source.d_k={read['source']['d_k']} must be the d_k of the config, "
                f"{list(checkpoint.spec.d_k)}, where export='masked'"
            )
    return record


def recovery_tokens(checkpoint: Checkpoint) -> int | None:
    """How many tokens `recover` trained the checkpoint on. None for none, and where its record does not say: to
    measure a checkpoint, nobody need know how it was made."""
    recovery = (checkpoint.reduction or {}).get("recovery")
    tokens = recovery.get("tokens") if isinstance(recovery, dict) else None
    return tokens if isinstance(tokens, int) else None


def is_masked(record: Mapping[str, Any]) -> bool:
    """Whether `state_reduction.json` is of a checkpoint whose removed channels are zeros that still take their room.
    Records from before there were two forms do not say, and are of sliced ones."""
    return record.get("export") == "masked"
