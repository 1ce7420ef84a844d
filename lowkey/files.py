"""Writing files: whether a place takes them, asked before the work, and failures that name the place."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError

T = TypeVar("T")


class OutputError(ValueError):
    """A file or directory that can't be written; the message names it and the reason."""


def check_writable(path: Path) -> int:
    """Find out whether `path`, a file or a directory, can be created or replaced, without creating it.

    A small file is written into the nearest folder that is there and removed again: permission bits say little (root
    ignores them, and a read-only or full file system has them all the same).

    Returns:
        The bytes that are free there.

    Raises:
        OutputError: it can't.
    """
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    try:
        # Named like the temporary files of `replacing`, so that a name that is too long is found here.
        probe, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=folder)
        try:
            os.write(probe, bytes(4096))
        finally:
            os.close(probe)
            os.unlink(name)
        return shutil.disk_usage(folder).free
    except OSError as e:
        raise OutputError(f"{path} can't be written: {folder} takes no new file ({e.strerror})") from e


def check_new_file(path: Path, name: str, *, overwrite: bool) -> None:
    """Refuse the output file `path` of the option or argument `name` before any work is done.

    Raises:
        OutputError: it is there and `overwrite` is off, it is no regular file, or it can't be written.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"{name}={str(path)!r} is there and is no regular file; choose another name")
    if path.exists() and not overwrite:
        raise OutputError(f"{name}={str(path)!r} already exists; choose another file or pass --overwrite")
    check_writable(path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises OutputError, with the path and the reason, for what goes wrong in the block while `path` is written."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise OutputError(f"{path} can't be written: {reason}") from e


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write to, which becomes `path` when the block ends without an error.

    Raises:
        OutputError: it can't be written. Nothing is left of it then.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            yield temporary
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_or_keep(path: Path, write: Callable[[Path], T]) -> T:
    """`write(path)`; where that fails, the same in a new folder for temporary files: hours of work are in it.

    Raises:
        OutputError: `path` can't be written. The message says where the result is instead.
    """
    try:
        return write(path)
    except OutputError as e:
        try:
            with writing(Path(tempfile.gettempdir())):
                folder = Path(tempfile.mkdtemp(prefix="lowkey-"))
            try:
                write(folder / path.name)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
        except OutputError as again:
            raise OutputError(f"{e}; and neither can a copy: {again}") from e
        raise OutputError(f"{e}; what was computed is in {folder / path.name}") from e
