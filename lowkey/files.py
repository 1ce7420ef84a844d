"""Outputs: whether a place takes them, asked before the work, and failures that name the place."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

from lowkey.leftovers import note_leftovers
from lowkey.signals import written

T = TypeVar("T")


class OutputError(ValueError):
    """A file or directory that can't be written; the message names it and the reason."""


Found = tuple[tuple[str, int, int, int], ...]
"""What was found at a path: an entry for it and one for everything in it, each with the relative path, the device, the
inode and the time of the last modification in ns."""


class OutputTakenError(OutputError):
    """A result is whole, but did not get its name, mostly because that was taken meanwhile. The message says where it
    is instead."""

    def __init__(self, message: str, kept: Path) -> None:
        super().__init__(message)
        self.kept = kept
        """The path at which the result is instead."""


def found_at(path: Path) -> Found | None:
    """What is at `path`, to be told apart later from anything else that may be there; None if there is nothing.

    The time is part of it: file systems give the inode of a deleted file to the next one.
    """
    below = [os.path.join(top, name) for top, folders, files in os.walk(path) for name in (*folders, *files)]
    found = []
    for file in (str(path), *sorted(below)):
        with suppress(OSError, ValueError):
            status = os.lstat(file)
            found.append((os.path.relpath(file, path), status.st_dev, status.st_ino, status.st_mtime_ns))
    return tuple(found) or None


def check_writable(path: Path) -> int:
    """Find out whether `path`, a file or a directory, can be created or replaced, without creating it.

    A small file is written into the nearest folder that is there and removed again: permission bits say little (root
    ignores them, and a read-only or full file system has them all the same).

    Returns:
        The bytes that are free there.

    Raises:
        OutputError: it can't.
    """
    if path.name in ("", ".."):
        raise OutputError(f"{str(path)!r} can't be written: it must end in a name")
    if "\0" in str(path):
        raise OutputError(f"{str(path)!r} can't be written: no name holds a NUL byte")
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as e:  # safetensors writes to no other
        raise OutputError(f"{str(path)!r} can't be written: its name is not UTF-8") from e
    absolute = path.absolute()
    folder = next(parent for parent in absolute.parents if os.path.lexists(parent))
    try:
        longest = max(len(os.fsencode(name)) for name in absolute.relative_to(folder).parts)
        # Room for what is made beside an output, `.NAME.xxxxxxxx/new`, and for the names of files in it.
        whole = len(os.fsencode(absolute)) + 128
        for which, length in (("PC_NAME_MAX", longest), ("PC_PATH_MAX", whole)):
            if 0 < os.pathconf(folder, which) < length:  # -1 or 0: the file system states no limit
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        # Named like the directories that results are made in, so that a name that is too long is found here.
        probe, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
        try:
            with open(probe, "wb") as file:  # goes on where a write was cut short, and then fails
                file.write(bytes(4096))
        finally:
            os.unlink(name)
        free = shutil.disk_usage(folder).free
    except OSError as e:
        raise OutputError(f"{path} can't be written: {folder} takes no new file ({e.strerror})") from e
    return free


def refuse_link(path: Path, name: str) -> None:
    """Raises OutputError for an output that is a link, dangling or not: whether the link or what it leads to is meant
    is not ours to say."""
    if os.path.islink(path):
        raise OutputError(
            f"{name}={str(path)!r} is a link to {os.readlink(path)!r}; name the place itself, or another one"
        )


def check_new_file(path: Path, name: str, *, overwrite: bool) -> Found | None:
    """Refuse the output file `path` of the option or argument `name` before any work is done. What killed runs have
    left beside it is named on standard error.

    Returns:
        What is there and may be replaced, or None if nothing is.

    Raises:
        OutputError: It is there and `overwrite` is off, it is a link or no regular file, or it can't be written.
    """

    def refused() -> str | None:
        if not os.path.isfile(path):
            return "is there and is no regular file; choose another name"
        return None if overwrite else "already exists; choose another file or pass --overwrite"

    return _check_new(path, name, refused)


def check_new_directory(path: Path, name: str, *, overwrite: bool, holds: str) -> Found | None:
    """As `check_new_file`, for a directory. One that is there is replaced only if it has a file `holds`, by which an
    earlier result of the same command is known."""

    def refused() -> str | None:
        if not overwrite:
            return "already exists; choose another output or pass --overwrite"
        if not (path / holds).exists():
            return (
                f"holds no {holds}, so --overwrite does not replace it; "
                "remove it yourself or choose another output"
            )
        return None

    return _check_new(path, name, refused)


def _check_new(path: Path, name: str, refused: Callable[[], str | None]) -> Found | None:
    """Refuse an output. `refused` says why what is there may not be replaced, if it may not."""
    refuse_link(path, name)
    # `os.path` says False where `Path` raises: for names that `check_writable` refuses.
    there = os.path.exists(path)
    if there and (why := refused()):
        raise OutputError(f"{name}={str(path)!r} {why}")
    check_writable(path)
    note_leftovers(path)
    return found_at(path) if there else None  # what has appeared since may not be replaced


def refuse_input(path: Path, name: str, inputs: Iterable[Path]) -> None:
    """Refuse an output file that is there and that the command itself reads.

    Args:
        name: the option or argument that names it.
        inputs: files and directories that are read.

    Raises:
        OutputError: it is one of the files, or in one of the directories.
    """
    if not os.path.exists(path):
        return
    for read in filter(os.path.exists, inputs):
        within = read.is_dir() and path.resolve().is_relative_to(read.resolve())
        if within or path.samefile(read):
            raise OutputError(
                f"{name}={str(path)!r} {'is in' if within else 'is'} {str(read)!r}, which is read; choose another file"
            )


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises OutputError, with the path and the reason, for what goes wrong in the block while `path` is written."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise OutputError(f"{path} can't be written: {reason}") from e


def write_or_keep(path: Path, write: Callable[[Path], T]) -> T:
    """`write(path)`; where that fails, the same in a new folder for temporary files: hours of work are in it.

    Raises:
        OutputError: `path` can't be written. The message says where the result is instead.
    """
    try:
        return write(path)
    except OutputTakenError:  # the result is whole already, and beside its place
        raise
    except OutputError as e:
        try:
            with writing(Path(tempfile.gettempdir())):
                folder = Path(tempfile.mkdtemp(prefix="lowkey-"))
            try:
                write(folder / path.name)
            except BaseException as again:
                # A signal may have come after the copy was written.
                whole = any(file.is_relative_to(folder) for file in written)
                if isinstance(again, OutputError) or not whole:
                    shutil.rmtree(folder, ignore_errors=True)
                raise
        except OutputError as again:
            raise OutputError(f"{e}; and neither can a copy: {again}") from e
        raise OutputError(f"{e}; what was computed is in {folder / path.name}") from e
