"""Where text comes from: files, folders, globs, JSON lines and Hugging Face data sets."""

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lowkey import how_to_install
from pruning.calibration import Text
from pruning.errors import PruningError

DEFAULT_FIELD = "text"
JSON_LINES = ".jsonl"
_SHUFFLE_BUFFER = 1000
"""Documents that a streamed data set is shuffled within."""
_CHARACTERS_PER_TOKEN = 16
"""Characters read from a data set for each token that is wanted: some four times what a window takes, so that windows
come from many documents."""


def read_text(sources: Sequence[str | Path], field: str | None = None) -> Text:
    """UTF-8 files, folders, globs (`**` included) and JSON lines (`.jsonl`).

    A file is one document, a JSON line is one. A folder stands for all files in it that are UTF-8 text, at any depth
    and in the order of their names; what is hidden or no text is left out. A file that two sources name is read once.

    Args:
        field: which field of the JSON lines is the text; "text" unless given.

    Raises:
        PruningError: a file is missing or no text, a pattern or folder has none, a JSON line lacks the field, `field`
            is given and nothing read has fields, or all the text is empty.
    """
    files: dict[Path, None] = {}
    for source in sources:
        files |= dict.fromkeys(_files(Path(source)))
    if field is not None and not any(path.suffix == JSON_LINES for path in files):
        raise PruningError(f"field={field!r} is for {JSON_LINES} files and data sets; none is given")
    documents: list[str] = []
    for path in files:
        if path.suffix == JSON_LINES:
            documents += _json_lines(path, field or DEFAULT_FIELD)
        else:
            documents.append(_decoded(path))
    if not any(documents):
        raise PruningError(f"text={[str(s) for s in sources]} holds no text")
    return Text(", ".join(Path(source).name or str(source) for source in sources), documents)


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        inside = [p for p in sorted(source.rglob("*")) if not _hidden(p.relative_to(source)) and p.is_file()]
        found = [p for p in inside if p.suffix == JSON_LINES or _is_text(p)]
        if not found:
            raise PruningError(f"text={str(source)!r} is a folder without text files")
        return found
    if source.exists() or not glob.has_magic(str(source)):
        return [source]
    matches = [Path(p) for p in sorted(glob.glob(str(source), recursive=True))]
    found = [p for p in matches if p.is_file()]
    if not found:
        raise PruningError(f"text={str(source)!r} matches no file")
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(path: Path) -> bool:
    try:
        _decoded(path)
    except PruningError:
        return False
    return True


def _decoded(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise PruningError(f"text={str(path)!r} is not a readable UTF-8 file: {e}") from e
    if "\0" in text:
        raise PruningError(
            f"text={str(path)!r} is not a text file: it has a NUL at character {text.index(chr(0))}"
        )
    return text


def _json_lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_decoded(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as e:
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
    path, _, revision = name.partition("@")
    path, _, subset = path.partition(":")
    try:
        stream = datasets.load_dataset(
            path, subset or None, split=split, revision=revision or None, streaming=True
        ).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
        documents = list(_enough(iter(stream), field or DEFAULT_FIELD, name, tokens * _CHARACTERS_PER_TOKEN))
    except PruningError:
        raise
    except Exception as e:  # the package lets errors of many libraries through
        raise PruningError(
            f"dataset={name!r}, split {split!r}, can't be read: {type(e).__name__}: {e}"
        ) from e
    if not any(documents):
        raise PruningError(f"dataset={name!r}, split {split!r}, holds no text")
    return Text(f"{name}, split {split}", documents)


def _enough(records: Iterator[dict[str, Any]], field: str, name: str, characters: int) -> Iterator[str]:
    for number, record in enumerate(records, start=1):
        text = _field(record, field, f"dataset={name!r}, record {number}")
        yield text
        characters -= len(text)
        if characters <= 0:
            return
