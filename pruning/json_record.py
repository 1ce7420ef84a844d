"""Reading the JSON files that say by themselves of which kind and format they are."""

from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from pruning.errors import PruningError


class Record(Protocol):
    """What such a file decodes to."""

    @property
    def kind(self) -> str: ...

    @property
    def format(self) -> int: ...


T = TypeVar("T", bound=Record)


def read_record(path: Path, as_type: type[T], kind: str, version: int, made_by: str) -> T:
    """Decode a file of one kind and format, which the command `made_by` writes.

    Raises:
        PruningError: the file is missing, of another kind or format, or something else.
    """
    try:
        record = msgspec.json.decode(path.read_bytes(), type=as_type)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise PruningError(f"{path} is not a file of {made_by}: {e}") from e
    if (record.kind, record.format) != (kind, version):
        raise PruningError(
            f"{path} is {record.kind!r} of format {record.format}; this version reads {kind!r} of format {version}"
        )
    return record
