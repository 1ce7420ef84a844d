"""The files that a path, a folder or a glob stands for: each file once, whatever links lead to it."""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modeling.sources import as_path
from pruning.errors import PruningError

Identity = tuple[int, int]
"""Device and inode: what tells files and directories apart, by whatever names they are found."""


@dataclass(frozen=True)
class TextFile:
    """A file to read."""

    path: Path
    identity: Identity
    chosen: bool
    """True if the user named it or a glob matched it: it has to be text then. Files that are found in a folder are left
    out if they are no text."""


def text_files(source: str | Path) -> list[TextFile]:
    """What `source` stands for, in the order of the names; a file that has several names may be there several times.

    Links are followed, those to directories too; each directory is entered once. What is hidden, no regular file or not
    there (a dangling link) is left out of folders and globs.

    Raises:
        PruningError: `source` is not there, no file to read, or a pattern that matches no file.
    """
    path = as_path(source)
    if os.path.isdir(path):
        return [
            TextFile(inside, _identity(found), chosen=False)
            for inside, found in _walk(path, set())
            if stat.S_ISREG(found.st_mode)
        ]
    if os.path.lexists(path) or not glob.has_magic(str(path)):
        return [_named(path)]
    matches = []
    names = {str(Path(name)) for name in _expand("", str(path).split(os.sep), {})}
    for match in map(Path, sorted(names)):
        found = _stat(match)
        if found is not None and stat.S_ISREG(found.st_mode):
            matches.append(TextFile(match, _identity(found), chosen=True))
    if not matches:
        raise PruningError(f"text={str(source)!r} matches no file")
    return matches


def _named(path: Path) -> TextFile:
    try:
        found = path.stat()
    except OSError as e:
        raise PruningError(f"text={str(path)!r} is not a readable UTF-8 file: {e}") from e
    # What a shell makes of <(command) is a pipe without a name; one with a name may wait for its writer for ever.
    unnamed = stat.S_ISFIFO(found.st_mode) and not os.path.exists(os.path.realpath(path))
    if not (stat.S_ISREG(found.st_mode) or unnamed):
        raise PruningError(f"text={str(path)!r} is neither a regular file nor a folder")
    return TextFile(path, _identity(found), chosen=True)


def _expand(root: str, pattern: Sequence[str], entered: dict[int, set[Identity]]) -> Iterator[str]:
    """Names in `root` that match a pattern, given in parts: those that `glob` finds with `recursive=True`, which would
    follow loops of links for as long as a path may be.

    Args:
        entered: the directories that each `**` has gone through, by the number of parts from it on.
    """
    if "**" not in pattern:
        for name in glob.iglob(os.sep.join(pattern), root_dir=root or None):
            yield os.path.join(root, name)
        return
    at = pattern.index("**")
    head, tail = pattern[:at], pattern[at + 1 :] or ["*"]
    if head == [""]:
        tops = [os.sep]
    else:
        tops = sorted(_expand(root, head, entered)) if head else [root]
    for top in tops:
        for directory, found in _walk(Path(top), entered.setdefault(len(pattern) - at, set())):
            if stat.S_ISDIR(found.st_mode):
                yield from _expand(str(directory), tail, entered)


def _walk(top: Path, entered: set[Identity]) -> Iterator[tuple[Path, os.stat_result]]:
    """`top` and all that is not hidden in it, at any depth, in the order of the names. No directory of `entered` is
    entered; each one that is joins them."""
    waiting = [top]
    while waiting:
        path = waiting.pop()
        found = _stat(path)
        if found is None:
            continue
        if stat.S_ISDIR(found.st_mode):
            if _identity(found) in entered:
                continue
            entered.add(_identity(found))
            try:
                inside = sorted(os.listdir(path), reverse=True)
            except OSError:  # gone meanwhile, or not ours to read
                continue
            waiting += [path / name for name in inside if not name.startswith(".")]
        yield path, found


def _stat(path: Path) -> os.stat_result | None:
    """None for a dangling link, a loop of links and what has gone meanwhile."""
    try:
        return path.stat()
    except OSError:
        return None


def _identity(found: os.stat_result) -> Identity:
    return found.st_dev, found.st_ino
