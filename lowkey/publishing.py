"""Results get their final names when they are whole, and never in place of something that appeared meanwhile.

A result is made in a hidden directory beside its place, `.NAME.xxxxxxxx`, which its process has locked.
It gets its name by an operation that fails if the name is taken: a hard link for a file; for a directory `mkdir`, which
claims the name, and a rename onto the empty directory, which fails once anything is in it. Python has no `renameat2`
with RENAME_NOREPLACE, and network file systems often lack it. Where there are no hard links, an empty file claims the
name.
"""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lowkey.files import Found, OutputError, OutputTakenError, found_at, writing
from lowkey.leftovers import LOCK, NEW, OLD, locked, note_leftovers
from lowkey.signals import uninterrupted, written

_TRIES = 10
_own: dict[Path, int] = {}
"""The working directories of this process, each with the descriptor that holds its lock."""


@contextmanager
def new_file(path: Path, *, replaces: Found | None = None) -> Iterator[Path]:
    """A name to write a file to, which becomes `path` when the block ends without an error.

    Args:
        replaces: what may be replaced, as `found_at` saw it before the work.

    Raises:
        OutputTakenError: something else is at `path`; it stays, and the file is kept beside it.
        OutputError: it can't be written. Nothing is left of it then.
    """
    with _working_directory(path) as directory:
        yield directory / NEW
        _publish(directory, path, replaces)


def new_json(path: Path, value: Any, *, replaces: Found | None = None) -> None:
    """Write JSON. Arguments and errors are those of `new_file`."""
    text = _json_text(value)
    with new_file(path, replaces=replaces) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a file of a directory that is being made, in place of what is there. Raises OutputError if it can't
    be written."""
    text = _json_text(value)
    with writing(path):
        path.write_text(text, encoding="utf-8")


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def write_all(*writes: Callable[[], object]) -> None:
    """Write several results, the most precious first: one whose name is taken does not keep the others from being
    written.

    Raises:
        OutputTakenError: one or more did not get their names; the message says where each is. All others are written.
        OutputError: one can't be written. Those after it were not tried.
    """
    taken: list[OutputTakenError] = []
    for write in writes:
        try:
            write()
        except OutputTakenError as e:
            taken.append(e)
        except OutputError as e:
            raise OutputError("; ".join(map(str, (*taken, e)))) from e
    if taken:
        raise OutputTakenError("; ".join(map(str, taken)), taken[0].kept)


@contextmanager
def new_directory(path: Path, *, replaces: Found | None = None) -> Iterator[Path]:
    """A directory to fill, which becomes `path` when the block ends without an error. Otherwise as `new_file`."""
    with _working_directory(path) as directory:
        made = directory / NEW
        made.mkdir()
        yield made
        made.chmod(0o755)
        _publish(directory, path, replaces)


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory among the temporary files, removed after the block. What is written there is no result of the command
    (`lowkey.signals.written`)."""
    with tempfile.TemporaryDirectory(prefix="lowkey-") as directory:
        try:
            yield Path(directory)
        finally:
            written[:] = [path for path in written if not path.is_relative_to(directory)]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Like `new_file`, but replaces whatever is at `path`. Only for files that the command itself keeps, such as its
    progress.

    Raises:
        OutputError: it can't be written. Nothing is left of it then.
    """
    with _working_directory(path) as directory:
        yield directory / NEW
        (directory / NEW).rename(path)


@contextmanager
def sole_user(path: Path) -> Iterator[None]:
    """Keeps a progress file to one running command, by a lock on `.NAME.lock` beside it.

    Raises:
        OutputError: another command is using it, or the lock can't be written.
    """
    lock, descriptor = path.with_name(f".{path.name}.lock"), None
    try:
        with uninterrupted():
            descriptor = _lock_of(path, lock)
        note_leftovers(path)
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):  # where its folder is lost there is nothing to remove
                lock.unlink()
            os.close(descriptor)


def _lock_of(path: Path, lock: Path) -> int:
    with writing(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(_TRIES):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
            if locked(descriptor) is False:
                os.close(descriptor)
                raise OutputError(f"{path} is in use by another run; wait for that, or name another output")
            # The run before may have removed the file between its being opened and locked here.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), lock.stat()):
                    return descriptor
            os.close(descriptor)
        # Here the two never agree about the file: go on as on a file system without locks.
        return os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)


def remove_working_directories() -> None:
    """Remove the working directories that this process has still open: for its end."""
    for directory in list(_own):
        _remove(directory)


@contextmanager
def _working_directory(path: Path) -> Iterator[Path]:
    directory = None
    with writing(path):
        try:
            with uninterrupted():
                path.parent.mkdir(parents=True, exist_ok=True)
                directory = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
                # A file, since NFS locks no directories, and open for writing, without which it locks no file.
                _own[directory] = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(_own[directory], fcntl.LOCK_EX)
            yield directory
        finally:
            if directory is not None:
                with uninterrupted():
                    _remove(directory)


def _remove(directory: Path) -> None:
    descriptor = _own.pop(directory, None)
    if descriptor is None:
        return
    with suppress(OSError):
        for made in directory.iterdir():
            if made.is_dir() and not made.is_symlink():
                shutil.rmtree(made, ignore_errors=True)
            elif made.name != LOCK:
                made.unlink()
    os.close(descriptor)  # before its file is removed: NFS keeps the directory of one that is open
    shutil.rmtree(directory, ignore_errors=True)


def _publish(directory: Path, path: Path, replaces: Found | None) -> None:
    """Give what was made in `directory` its name, or another one beside it if that is taken.

    Raises:
        OutputTakenError: the name is taken, or what was there before could not be put back. The message says where
            both are; if one is still in `directory`, that stays.
    """
    new, old = directory / NEW, directory / OLD
    with uninterrupted(), writing(path):
        try:
            _put_aside(path, old, replaces)
            try:
                _place(new, path)
            except OSError:
                if os.path.lexists(old):
                    _place(old, path)
                raise
        except OSError as e:
            stranded = os.path.lexists(old)
            taken = isinstance(e, FileExistsError)
            if not stranded and not taken:
                raise
            if stranded:
                os.close(_own.pop(directory))  # it is the user's now
            kept = _keep(directory, path, or_leave=stranded)
            written.append(kept)
            why = (
                "has appeared or changed since the command began, and stays as it is"
                if taken
                else f"can't be written: {e.strerror or e}"
            )
            before = f"; what was there before is in {old}" if stranded else ""
            raise OutputTakenError(f"{path} {why}; what was computed is in {kept}{before}", kept) from e
        written.append(path)


def _put_aside(path: Path, old: Path, replaces: Found | None) -> None:
    """Move what may be replaced to `old`: a crash must not lose both.

    Raises:
        FileExistsError: something else is there.
    """
    if replaces is None or not os.path.lexists(path):
        return
    if found_at(path) == replaces:
        path.rename(old)
        # Some file systems give what is moved another inode, so now only the names and times are compared.
        if [(name, time) for name, *_, time in found_at(old) or ()] == [
            (name, time) for name, *_, time in replaces
        ]:
            return
        _place(old, path)
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _place(made: Path, path: Path) -> None:
    """Give `made` the name `path`. Raises FileExistsError if something has that name."""
    if made.is_dir():
        path.mkdir()
        try:
            made.rename(path)
        except OSError as e:
            with suppress(OSError):
                path.rmdir()
            if e.errno == errno.ENOTEMPTY:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from e
            raise
        return
    try:
        os.link(made, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: an empty file claims the name
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        try:
            made.rename(path)
        except OSError:
            path.unlink()
            raise
        return
    with suppress(OSError):  # its directory is removed anyway
        made.unlink()


def _keep(directory: Path, path: Path, *, or_leave: bool) -> Path:
    """Give what was made in `directory` a name beside `path`, which is not that of a working directory.

    Args:
        or_leave: where it can't get one, leave it where it is. Otherwise an OSError is raised.
    """
    made = directory / NEW
    stem, suffix = (path.name, "") if made.is_dir() else (path.stem, path.suffix)
    kept = path.with_name(f"{stem}.{directory.name[-8:]}{suffix}")
    try:
        _place(made, kept)
    except OSError:
        if not or_leave:
            raise
        return made
    return kept
