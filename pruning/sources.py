"""Where text comes from: files, folders, globs, JSON lines and Hugging Face data sets."""

import codecs
import gzip
import io
import itertools
import json
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowkey import how_to_install
from lowkey.words import counted
from modeling.sources import as_path
from pruning.calibration import Text
from pruning.errors import PruningError
from pruning.text_files import Identity, TextFile, text_files

logger = logging.getLogger(__name__)

DEFAULT_FIELD = "text"
GZIPPED = ".gz"
JSON_LINES = (".jsonl", ".ndjson")
_BLOCK = 2**20
"""Bytes of a file that are decoded at once."""
_SHUFFLE_BUFFER = 1000
"""Documents that a streamed data set is shuffled within."""
_CHARACTERS_PER_TOKEN = 16
"""Characters read from a data set for each token that is wanted: some four times what a window takes, so that windows
come from many documents."""


def read_text(sources: Sequence[str | Path], field: str | None = None) -> Text:
    """UTF-8 files, folders, globs (`**` included) and JSON lines (`.jsonl`, `.ndjson`), each gzipped (`.gz`) or not.

    A file is one document, a JSON line is one; a byte order mark is no part of it. A folder stands for all files in it
    that are UTF-8 text, at any depth and in the order of their names; what is hidden or no text is left out. A file
    that two sources name is read once. Empty documents are left out, and a warning says how many.

    Args:
        field: which field of the JSON lines is the text; "text" unless given.

    Raises:
        PruningError: a file is missing or no text, a pattern or folder has none, a JSON line lacks the field, `field`
            is given and nothing read has fields, or all the text is empty.
    """
    by_source = [text_files(source) for source in sources]
    files: dict[Identity, TextFile] = {}
    for file in itertools.chain(*by_source):
        known = files.setdefault(file.identity, file)
        # Of several names the file's own counts, not a link's, then one that says that it has lines, then the first.
        told = min(known, file, key=lambda f: (f.path.is_symlink(), not _has_lines(f)))
        files[file.identity] = replace(told, chosen=known.chosen or file.chosen)
    documents: list[str] = []
    read: set[Identity] = set()
    for file in files.values():
        try:
            text = _decoded(file.path)
        except _NoTextError:
            if file.chosen or _has_lines(file):
                raise
            continue
        read.add(file.identity)
        documents += _json_lines(file.path, text, field or DEFAULT_FIELD) if _has_lines(file) else [text]
    for source, found in zip(sources, by_source, strict=True):
        if not read & {file.identity for file in found}:
            raise PruningError(f"text={str(source)!r} is a folder without text files")
    if field is not None and not any(map(_has_lines, files.values())):
        raise PruningError(f"field={field!r} is for {JSON_LINES[0]} files and data sets; none is given")
    name = ", ".join(Path(source).name or str(source) for source in sources)
    return Text(name, _not_empty(documents, f"text={[str(s) for s in sources]}"))


def _has_lines(file: TextFile) -> bool:
    return file.path.name.lower().removesuffix(GZIPPED).endswith(JSON_LINES)


def _not_empty(documents: Sequence[str], where: str) -> list[str]:
    """The documents that have text: an empty one would add nothing to a window but an end-of-text token.

    Raises:
        PruningError: there is none.
    """
    found = [document for document in documents if document]
    if not found:
        raise PruningError(f"{where}: holds no text")
    if empty := len(documents) - len(found):
        logger.warning(
            "note: %s: %s of %s %s empty and left out",
            where,
            f"{empty:,}",
            counted(len(documents), "document"),
            "is" if empty == 1 else "are",
        )
    return found


class _NoTextError(PruningError):
    """The file can be read, but what is in it is no text."""


def _decoded(path: Path) -> str:
    """The text of a file, read in pieces: what is no text is found at its first byte that is none, and not when all of
    it has been unpacked."""
    zipped = path.name.lower().endswith(GZIPPED)
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    pieces: list[str] = []
    try:
        with open(path, "rb") as raw:
            if zipped and raw.peek(2)[:2] != b"\x1f\x8b":
                raise _NoTextError(f"text={str(path)!r} is not a gzip file")
            f = gzip.GzipFile(fileobj=raw) if zipped else raw
            while block := f.read(_BLOCK):
                pieces.append(_without_nul(decoder.decode(block), path, pieces))
            pieces.append(decoder.decode(b"", final=True))
    except UnicodeDecodeError as e:
        line = 1 + sum(piece.count("\n") for piece in pieces) + e.object.count(b"\n", 0, e.start)
        raise _NoTextError(f"text={str(path)!r} is not a readable UTF-8 file: line {line}: {e}") from e
    except (OSError, EOFError, zlib.error) as e:
        kind = "gzip" if zipped else "UTF-8"
        raise PruningError(f"text={str(path)!r} is not a readable {kind} file: {e}") from e
    return "".join(pieces)


def _without_nul(piece: str, path: Path, before: list[str]) -> str:
    if "\0" in piece:
        at = sum(map(len, before)) + piece.index("\0")
        raise _NoTextError(f"text={str(path)!r} is not a text file: it has a NUL at character {at}")
    return piece


def _json_lines(path: Path, text: str, field: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:  # no JSON, a number of 5000 digits, 5000 brackets
            raise PruningError(f"{where} is not JSON: {e}") from e
        if not isinstance(value, dict):
            raise PruningError(
                f"{where} is a JSON {type(value).__name__}; it must be an object with a field {field!r}"
            )
        yield _field(value, field, where)


def _field(record: dict[str, Any], field: str, where: str) -> str:
    if field not in record:
        raise PruningError(
            f"{where} has no field {field!r}; it has {', '.join(map(repr, record)) or 'none'} (choose with --field)"
        )
    text = record[field]
    if not isinstance(text, str):
        raise PruningError(f"{where}: field {field!r} is a {type(text).__name__}; it must be text")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        half = f"\\u{ord(text[e.start]):04x} at character {e.start}"
        raise PruningError(
            f"{where}: field {field!r} holds half a surrogate pair, {half}; it must be text"
        ) from e
    return text


def dataset_text(
    name: str, *, split: str = "train", field: str | None = None, tokens: int, seed: int = 0
) -> Text:
    """Documents of a Hugging Face data set, streamed: as many as give plenty of windows for `tokens` tokens.

    The same name, split and seed read the same documents, as long as the data set does not change; name a revision.

    Args:
        name: `org/name`, with `:subset` and `@revision` behind it where needed, or a local folder of data files.

    Raises:
        PruningError: the package `datasets` is not installed, the data set can't be read or has no such split or field,
            or it is empty.
    """
    try:
        import datasets
    except ImportError as e:
        raise PruningError(f"reading data sets needs an extra: {how_to_install('eval')}") from e
    path, subset, revision = _dataset(name)
    try:
        stream = datasets.load_dataset(path, subset, split=split, revision=revision, streaming=True).shuffle(
            seed=seed, buffer_size=_SHUFFLE_BUFFER
        )
        documents = list(_enough(iter(stream), field or DEFAULT_FIELD, name, tokens * _CHARACTERS_PER_TOKEN))
    except PruningError:
        raise
    except Exception as e:  # the package lets errors of many libraries through
        raise PruningError(
            f"dataset={name!r}, split {split!r}, can't be read: {type(e).__name__}: {e}"
        ) from e
    return Text(f"{name}, split {split}", _not_empty(documents, f"dataset={name!r}, split {split!r}"))


def _dataset(name: str) -> tuple[str, str | None, str | None]:
    """Path or hub id, subset and revision of a data set's name. What exists is a path, whole.

    Raises:
        PruningError: a revision of a local folder, which has none.
    """
    if not name:
        raise PruningError("dataset='' names nothing; give org/name or a folder")
    whole = as_path(name)
    if os.path.exists(whole):
        return str(whole), None, None
    path, _, revision = name.partition("@")
    path, _, subset = path.partition(":")
    for end in (i for i in reversed(range(1, len(name))) if name[i] in ":@"):
        folder, behind = as_path(name[:end]), name[end + 1 :]
        if os.path.isdir(folder):
            if name[end] == ":" and not {"@", os.sep} & {*behind}:
                return str(folder), behind or None, None
            raise PruningError(
                f"dataset={name!r} is not there; {name[:end]} is, but local folders have no revisions: "
                f"give {name[:end]} alone, {name[:end]}:subset, or the right name of another folder"
            )
    if revision and name.startswith((os.sep, ".", "~")):
        raise PruningError(f"dataset={name!r} is not there, and local folders have no revisions")
    return path, subset or None, revision or None


def _enough(records: Iterator[dict[str, Any]], field: str, name: str, characters: int) -> Iterator[str]:
    for number, record in enumerate(records, start=1):
        text = _field(record, field, f"dataset={name!r}, record {number}")
        yield text
        characters -= len(text)
        if characters <= 0:
            return
