"""What runs that were killed have left behind, told apart from what runs that still work are using."""

import fcntl
import logging
import os
import re
from pathlib import Path

from lowkey.words import in_units

logger = logging.getLogger(__name__)

OLD = "old"
"""The name, in a working directory, of what is being replaced."""


def note_leftovers(path: Path) -> None:
    """Name on standard error what runs that were killed have left beside `path`. Nothing is removed: it may be all that
    there is of hours of work."""
    name = re.compile(re.escape(f".{path.name}.") + "[a-z0-9_]{8}")
    try:
        entries = sorted(path.absolute().parent.iterdir())
    except OSError:
        return
    for entry in entries:
        if name.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink() and not _in_use(entry):
            files = [Path(folder, file) for folder, _, names in os.walk(entry) for file in names]
            size = in_units(sum(file.lstat().st_size for file in files))
            old = f"its {OLD} is what {path} was before; " if (entry / OLD).exists() else ""
            logger.warning("note: %s (%s) was left by a run that was killed; %sremove it", entry, size, old)


def locked(descriptor: int) -> bool | None:
    """Lock an open file or directory; False if another holds the lock, None where the file system knows none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _in_use(directory: Path) -> bool:
    """Whether a process works in it, or that can't be told."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return True
    try:
        return locked(descriptor) is not True
    finally:
        os.close(descriptor)
