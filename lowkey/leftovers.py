"""What runs that were killed have left behind, told apart from what runs that still work are using."""

import fcntl
import logging
import os
import re
from contextlib import suppress
from pathlib import Path

from lowkey.words import in_units

logger = logging.getLogger(__name__)

NEW = "new"
"""Name of what is being made in a working directory."""
OLD = "old"
"""Name of what is being replaced, in the working directory that it was moved to."""
LOCK = "lock"
"""Name of the file in a working directory that its process has locked."""


def note_leftovers(path: Path) -> None:
    """Name on standard error what runs that were killed have left beside `path`. Nothing is removed: it may be all that
    there is of hours of work."""
    name = re.compile(re.escape(f".{path.name}.") + "[a-z0-9_]{8}")
    try:
        entries = sorted(path.absolute().parent.iterdir())
    except OSError:
        return
    for entry in entries:
        if not name.fullmatch(entry.name) or entry.is_symlink():
            continue
        with suppress(OSError):  # no directory, or one that goes while it is looked at
            inside = {file.name for file in entry.iterdir()}
            if inside <= {NEW, OLD, LOCK} and inside & {NEW, OLD} and not _in_use(entry):
                _note(entry, path)


def _note(entry: Path, path: Path) -> None:
    files = [Path(folder, file) for folder, _, names in os.walk(entry) for file in names]
    size = in_units(sum(file.lstat().st_size for file in files))
    what = "remove it"
    if os.path.lexists(entry / OLD):
        kind = "folder" if (entry / OLD).is_dir() else "file"
        what = f"its {kind} {OLD} holds what {path} was before: move that back if you need it, then remove the rest"
    logger.warning("note: %s (%s) was left by a run that was killed; %s", entry, size, what)


def locked(descriptor: int) -> bool | None:
    """Lock an open file; False if another holds the lock, None where the file system knows none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _in_use(directory: Path) -> bool:
    """Whether a process works in it, or that can't be told. Raises OSError if it has no lock."""
    descriptor = os.open(directory / LOCK, os.O_RDWR)
    try:
        return locked(descriptor) is not True
    finally:
        os.close(descriptor)
