"""What a user means by the name of a checkpoint: a local directory or a hub id. Imports no torch."""

import contextlib
import difflib
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER = "tokenizer.json"
_LIKE = 0.7
"""How alike two names are, from 0 to 1, where one may be a slip of the other."""


class CheckpointError(ValueError):
    """A checkpoint that can't be used; the message names the file or tensor and what would be right."""


def as_path(source: str | Path) -> Path:
    """The path that a user means: as it is written if that is there, else with `~` for the home directory."""
    path = Path(source)
    if not os.path.lexists(path):
        with contextlib.suppress(RuntimeError):  # ~somebody who has no account here
            return path.expanduser()
    return path


def local_directory(source: str | Path) -> Path | None:
    """The directory that `source` names, or None for a hub id (`org/name` or `org/name@revision`), which is not looked
    up here.

    A name that could be either, but is nearly that of a directory, is taken for a slip; with a revision it is a hub id.

    Raises:
        CheckpointError: a path that is no directory. Names the directory that is called nearly the same.
    """
    path = as_path(source)
    # Unlike Path.is_dir, os.path.isdir is False for a name that is too long or lies where we may not look.
    if os.path.isdir(path):
        try:
            str(path).encode()
        except UnicodeEncodeError as e:
            raise CheckpointError(f"{str(source)!r}: safetensors reads only names that are UTF-8") from e
        return path
    if path.suffix == ".gguf":
        raise CheckpointError(_no_gguf(path))
    if os.path.exists(path):
        raise CheckpointError(f"{source} is a file; give the directory of a safetensors checkpoint")
    name, revision, _ = str(source).partition("@")
    near = _nearly(path)
    instead = "" if near is None else f"; did you mean {near}?"
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{source}: no such directory, and not a hub id of the form org/name[@revision]{instead}"
        )
    if instead and not revision:
        raise CheckpointError(
            f"{source}: no such directory{instead} From the hub it is taken as {source}@main"
        )
    return None


def refuse_gguf(directory: Path) -> None:
    """Raises CheckpointError for a directory whose weights are in GGUF files only."""
    gguf = sorted(directory.glob("*.gguf"))
    if gguf and not any(directory.glob("*.safetensors")):
        raise CheckpointError(_no_gguf(gguf[0]))


def has_weights(directory: Path) -> bool:
    """Whether a directory holds weights that can be read, beside its config."""
    return any((directory / file).exists() for file in (SINGLE, INDEX))


def check_source(source: str) -> None:
    """What can be seen of a checkpoint to be served without reading it: the files of a local one are there. Hub ids are
    not looked up. Raises CheckpointError."""
    directory = local_directory(source)
    if directory is None:
        return
    refuse_gguf(directory)
    there = {
        "config.json": (directory / "config.json").exists(),
        f"{SINGLE} or {INDEX}": has_weights(directory),
        TOKENIZER: (directory / TOKENIZER).exists(),
    }
    for needed, found in there.items():
        if not found:
            raise CheckpointError(f"{source} has no {needed}")


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds. Raises CheckpointError if it is missing or holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError(f"{path} is missing") from e
    except OSError as e:
        raise CheckpointError(f"{path} can't be read: {e}") from e
    except (ValueError, RecursionError) as e:  # no JSON, no UTF-8, a number of 5000 digits, 5000 brackets
        raise CheckpointError(f"{path} is not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}")
    return value


def checkpoint_sha256(directory: Path, weights: Iterable[Path]) -> str:
    """Hash of a checkpoint's config and weight files, which are read whole. Raises OSError if one can't be."""
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(set(weights)):
        with path.open("rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def _no_gguf(path: Path) -> str:
    return f"{path}: GGUF is not supported: give the safetensors checkpoint"


def _nearly(path: Path) -> Path | None:
    """The directory whose path differs from this one by slips of spelling."""
    found = Path(path.anchor)
    for part in path.relative_to(path.anchor).parts:
        if not os.path.isdir(found / part):
            try:
                names = [entry.name for entry in found.iterdir() if entry.is_dir()]
            except OSError:
                return None
            close = difflib.get_close_matches(part, names, n=1, cutoff=_LIKE)
            if not close:
                return None
            part = close[0]
        found /= part
    return found
