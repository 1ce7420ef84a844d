"""Saved states: safetensors files in one directory, which every replica of a variant may share.

An engine writes a file, and any engine of the same model and layout can go on from it. The file's own metadata says
what it is (its fingerprint); its name says whose it is; its time of modification when it was last used. Nothing else
is kept, so that what is in the directory is all there is to know.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from modeling.sources import checkpoint_sha256
from server.settings import NAME

FORMAT = "lowkey-state-1"
MAX_HEADER_BYTES = 2**20
"""Longest header that is read; the names and shapes of any model's layers take far less."""
ABANDONED_S = 3600.0
"""Seconds after which a half-written file is removed: nobody writes it any more."""

_PARTIAL = re.compile(r"\.{1,2}[0-9a-f]{32}\.part(\.[0-9a-f]{8})?")
"""The names of files that are not whole yet: ours, and the one under which an engine writes it."""
_ID = re.compile(r"state-[0-9a-f]{32}")
_COUNT = re.compile(r"[1-9][0-9]{0,9}")


class StateFileError(Exception):
    """A file that is no saved state; the message says why."""


class OtherModelError(Exception):
    """A saved state that doesn't fit the model that is to go on from it; the message says why."""


@dataclass(frozen=True)
class Fingerprint:
    """What two models must have in common for one to go on from the other's state."""

    model: str
    """SHA-256 of the config and the weights."""
    d_k: str
    """Key channels per head of each layer, separated by commas."""
    state_dtype: str
    layout: str = "[num_v_heads, d_k, d_v]"

    def metadata(self, variant: str, tokens: int) -> dict[str, str]:
        """The metadata of a file of a state after so many tokens."""
        return {
            "format": FORMAT,
            "variant": variant,
            "tokens": str(tokens),
            "created": str(int(time.time())),
            **vars(self),
        }

    def check(self, metadata: dict[str, str], variant: str) -> None:
        """Raises OtherModelError, with both sides of what differs, unless the file is of this model."""
        for field, meaning in (
            ("d_k", "key channels per head"),
            ("state_dtype", "state dtype"),
            ("layout", "layout"),
            ("model", "config and weights"),
        ):
            theirs, ours = metadata.get(field), getattr(self, field)
            if theirs != ours:
                raise OtherModelError(
                    f"the state was saved by variant {metadata.get('variant')!r} and can't be continued by "
                    f"{variant!r}: {meaning} ({field}) {str(theirs)[:80]!r} there, {ours[:80]!r} here. A state belongs "
                    "to the model that made it; save one with this model"
                )


@dataclass(frozen=True)
class Header:
    """What the beginning of a saved state's file says."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, list[int]]]
    """Dtype, as safetensors calls it, and shape of each tensor by name."""
    data_at: int
    size: int
    """Bytes of the whole file."""

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.size - self.data_at

    @property
    def tokens(self) -> int:
        """How many tokens the state stands for."""
        return int(self.metadata["tokens"])


def header_length(start: bytes) -> int:
    """Bytes of the JSON that follows the first eight. Raises StateFileError."""
    if len(start) < 8:
        raise StateFileError("is no safetensors file: it ends within its first eight bytes")
    length: int = struct.unpack("<Q", start[:8])[0]
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise StateFileError(f"is no saved state: its header has {length} bytes, not 2 to {MAX_HEADER_BYTES}")
    return length


def parse_header(text: bytes) -> Header:
    """Check the JSON of a safetensors header: each tensor a list of numbers, one after the other without a gap.

    Raises:
        StateFileError: it is none, or not that of a saved state.
    """
    try:
        table = json.loads(text.decode())  # given bytes, it would also take UTF-16
    except (ValueError, RecursionError) as e:
        raise StateFileError("is no safetensors file: its header is no JSON in UTF-8") from e
    metadata = table.pop("__metadata__", None) if isinstance(table, dict) else None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise StateFileError(f"is no saved state: its metadata has no format {FORMAT!r}")
    if not all(isinstance(value, str) and len(value) <= 10_000 for value in metadata.values()):
        raise StateFileError("is no saved state: its metadata is no table of texts")
    for count in ("tokens", "created"):
        if not _COUNT.fullmatch(metadata.get(count, "")):
            raise StateFileError(f"is no saved state: its metadata has no number {count!r}")
    if not re.fullmatch(NAME, metadata.get("variant", "")):  # it is told to clients
        raise StateFileError("is no saved state: its metadata names no variant")
    end = 0
    try:
        for entry in sorted(table.values(), key=lambda entry: tuple(entry["data_offsets"])):
            start, stop = entry["data_offsets"]
            if type(start) is not int or type(stop) is not int or start != end or stop < start:
                raise StateFileError("is no saved state: its tensors do not follow each other")
            end = stop
        tensors = {name: (entry["dtype"], entry["shape"]) for name, entry in table.items()}
    except (TypeError, KeyError, ValueError) as e:
        raise StateFileError("is no saved state: its header has no table of tensors") from e
    data_at = 8 + len(text)
    return Header(metadata, tensors, data_at, data_at + end)


def read_header(file: IO[bytes]) -> Header:
    """The header of an open file, which is left at its data. Raises StateFileError."""
    start = file.read(8)
    text = file.read(header_length(start))
    return parse_header(text)


def check_opens(path: Path) -> None:
    """Open a file by the library that engines read states with: it takes less for JSON than Python does, and compares
    shapes with sizes. Raises StateFileError."""
    try:
        with safe_open(path, framework="numpy"):
            return
    except SafetensorError as e:
        raise StateFileError(f"is no safetensors file: {e}") from e


def weights_sha256(checkpoint: Path) -> str:
    """Hash of a checkpoint's config and weights. Reads all of it: takes seconds for a large model."""
    return checkpoint_sha256(checkpoint, checkpoint.glob("*.safetensors"))


@dataclass(frozen=True)
class SavedState:
    """One file of the store."""

    id: str
    path: Path
    header: Header
    expires: float
    """When it goes if nobody uses it until then, in seconds since 1970."""

    def describe(self) -> dict[str, Any]:
        metadata = self.header.metadata
        return {
            "id": self.id,
            "object": "state",
            "variant": metadata["variant"],
            "tokens": self.header.tokens,
            "bytes": self.header.size,
            "created": int(metadata["created"]),
            "expires": int(self.expires),
        }


class StateStore:
    """The files of one directory. Its methods read and write disks: call them in a thread.

    Args:
        ttl_s: a state that nobody has used for so long is gone.
        budget_bytes: of all files together; the least recently used go first.
    """

    def __init__(self, directory: Path, ttl_s: float, budget_bytes: int) -> None:
        self._directory = directory
        self._ttl_s = ttl_s
        self.budget_bytes = budget_bytes
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # a state tells of its prompt

    def new_file(self) -> Path:
        """Where to write a state before it is `keep`t."""
        return self._directory / f".{secrets.token_hex(16)}.part"

    def keep(self, written: Path, owner: str) -> SavedState:
        """Take a written file in, and let go what is over the budget. Raises StateFileError."""
        state_id = f"state-{secrets.token_hex(16)}"
        with written.open("rb") as f:
            header = read_header(f)
        path = self._path(state_id, owner)
        os.utime(written)
        written.rename(path)
        self.sweep(keep=path)
        return SavedState(state_id, path, header, time.time() + self._ttl_s)

    def find(self, state_id: str, owner: str) -> SavedState | None:
        """A state of this owner; None if there is none. An id is looked at before it becomes part of a name."""
        if not _ID.fullmatch(state_id):
            return None
        path = self._path(state_id, owner)
        try:
            with path.open("rb") as f:
                used = os.fstat(f.fileno()).st_mtime
                header = read_header(f)
        except (FileNotFoundError, StateFileError):
            return None
        if used + self._ttl_s < time.time():
            return None
        return SavedState(state_id, path, header, used + self._ttl_s)

    def touch(self, state: SavedState) -> None:
        """Note that a state is used now. Raises FileNotFoundError if it has just gone."""
        os.utime(state.path)

    def delete(self, state_id: str, owner: str) -> bool:
        """Remove a state of this owner. Returns whether there was one."""
        state = self.find(state_id, owner)
        if state is None:
            return False
        state.path.unlink(missing_ok=True)
        return True

    def list(self, owner: str) -> list[SavedState]:
        """All states of this owner, the newest first."""
        suffix = f".{_owner_hash(owner)}.safetensors"
        names = [path.name.removesuffix(suffix) for path in self._directory.glob(f"state-*{suffix}")]
        states = [state for name in names if (state := self.find(name, owner)) is not None]
        return sorted(states, key=lambda state: -int(state.header.metadata["created"]))

    def sweep(self, keep: Path | None = None) -> None:
        """Remove what has expired, what was abandoned half-written, and the least recently used over the budget."""
        now = time.time()
        files: list[tuple[float, int, Path]] = []
        for path in self._directory.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another replica may sweep at the same time
                stat = path.stat()
                if _PARTIAL.fullmatch(path.name):
                    if stat.st_mtime + ABANDONED_S < now:
                        path.unlink()
                elif path.suffix == ".safetensors" and path.name.startswith("state-"):
                    if stat.st_mtime + self._ttl_s < now and path != keep:
                        path.unlink()
                    else:
                        files.append((stat.st_mtime, stat.st_size, path))
        over = sum(size for _, size, _ in files) - self.budget_bytes
        for _, size, path in sorted(files):
            if over <= 0:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                over -= size

    def _path(self, state_id: str, owner: str) -> Path:
        return self._directory / f"{state_id}.{_owner_hash(owner)}.safetensors"


def _owner_hash(owner: str) -> str:
    return hashlib.sha256(owner.encode()).hexdigest()[:16]
