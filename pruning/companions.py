"""The files of a checkpoint beside its weights, and which of them come along into one that is made of it."""

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from lowkey.publishing import write_json
from modeling.checkpoint import REDUCTION, Checkpoint
from modeling.sources import TOKENIZER, CheckpointError, read_json

RECOVERY = "recovery.json"
"""What `lowkey-prune recover` writes about a run, beside the weights that it trained."""
CARD = "README.md"
"""The model card, which the hub shows."""
SOURCE_CARD = "README.source.md"
"""The card of the source, in a checkpoint that is made of it: what it says it does not say of that one."""
CARD_MARK = "<!-- written by lowkey-prune -->"
"""By which a card of ours is known."""
CARD_BYTES = 2**20
"""Bytes of a card that are read, at most."""
_WEIGHTS = {
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".pkl",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".ot",
}
_WRITTEN_ANEW = ("config.json", REDUCTION, RECOVERY)
_CODE = "auto_map"
"""The key under which a JSON file of a checkpoint names classes in Python files beside it, or in another repository."""
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""How a hub cache names the files that its snapshots are links to."""


@dataclass(frozen=True)
class Companions:
    """What comes along of a checkpoint's other files: tokenizer, generation config, licence and the like.

    Weights in other formats, hidden files and what is written anew stay behind. A checkpoint must not be able to pull
    files of the machine into what its user may publish, so a link is followed only

    - to a file in the checkpoint;
    - to a file of the same name beside the weights, where those are links too, or to any beside weights that have lost
      their ending, as in a store that names files by their content;
    - from a snapshot of a hub cache to a file in the cache's store, or to one that is named by a hash.

    From such a snapshot no code comes along: none would be downloaded.
    """

    checkpoint: Checkpoint

    @cached_property
    def names(self) -> list[Path]:
        """Paths of what comes along, relative to the checkpoint.

        Its card comes along under another name (`SOURCE_CARD`). A card of ours does not: it is written anew.
        """
        return [
            name
            for name, follow in self._found.items()
            if follow and not (name == Path(CARD) and (self._has_source_card or self._card_is_ours))
        ]

    @property
    def _has_source_card(self) -> bool:
        return bool(self._found.get(Path(SOURCE_CARD)))

    @cached_property
    def _card_is_ours(self) -> bool:
        with _open(self.checkpoint.path / CARD) as card:
            return CARD_MARK.encode() in card.read(CARD_BYTES)

    @property
    def left_out(self) -> list[Path]:
        """Links that are not followed."""
        return [name for name, follow in self._found.items() if not follow]

    def copy(self, directory: Path) -> None:
        """Copy them; a JSON file that names code which does not come along loses that entry.

        Raises:
            CheckpointError: such a file can't be read.
        """
        for name in self.names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            if name in self._without_code:
                write_json(directory / name, self.without_missing_code(self._without_code[name]))
            else:
                target = SOURCE_CARD if name == Path(CARD) else name
                _copy(self.checkpoint.path / name, directory / target)

    def without_missing_code(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config without the names of classes whose code does not come along: nothing could load it."""
        return {key: value for key, value in config.items() if key != _CODE or not self._missing_code(config)}

    def notes(self) -> Iterator[str]:
        """Says what the output will lack.

        Raises:
            CheckpointError: a file that comes along can't be read.
        """
        for name in self.names:
            _open(self.checkpoint.path / name).close()
        linked = [
            name for name in self.names if not self._cached and not self._inside(self.checkpoint.path / name)
        ]
        if linked:
            yield f"note: copied over links to where the weights are: {', '.join(map(str, linked))}"
        if self.left_out:
            names = ", ".join(map(str, self.left_out))
            yield f"note: left out, because they are links to folders, to other places or to nothing: {names}"
        if self._found.get(Path(CARD)) and self._has_source_card and not self._card_is_ours:
            yield f"note: left out: {CARD}, because {SOURCE_CARD} comes along as the card of the source"
        if Path(TOKENIZER) not in self.names:
            source = self.checkpoint.source
            elsewhere = f"{TOKENIZER} of {source} is a link out of the checkpoint"
            reason = elsewhere if Path(TOKENIZER) in self.left_out else f"{source} has no {TOKENIZER}"
            yield f"note: {reason}, so the output has none: lowkey-serve refuses it until one is put there"
        without = {name: self._missing_code(config) for name, config in self._without_code.items()}
        without[Path("config.json")] = self._missing_code(self.checkpoint.config)
        for name, files in without.items():
            if files:
                yield (
                    f"note: {name} is written without its {_CODE}: the Python files that it names are not in the "
                    f"checkpoint ({', '.join(files)})"
                )

    @cached_property
    def _found(self) -> dict[Path, bool]:
        """Files and links beside the weights, relative to the checkpoint, and whether they come along."""
        root = self.checkpoint.path
        paths = {path.relative_to(root): path for path in sorted(root.rglob("*"))}
        results = {name.parent for name in paths if name.name == REDUCTION and name.parent.parts}
        found = {}
        for name, path in paths.items():
            anew = name.name.endswith(".index.json") or str(name) in _WRITTEN_ANEW
            code = self._cached and name.suffix == ".py"
            left = _hidden(name) or anew or code or name.suffix in _WEIGHTS or results & {*name.parents}
            if not left and (path.is_file() or path.is_symlink()):
                found[name] = path.is_file() and self._own(path, name)
        return found

    def _own(self, path: Path, name: Path) -> bool:
        """Whether a file is the checkpoint's own. Only where it lies in the end counts: a link on the way there may be
        as much a stranger's work as the checkpoint."""
        if self._inside(path):
            return True
        last = path.resolve()
        if last.name.startswith("."):
            return False
        if self._cached and (last.parent == self._blobs or _HASH.fullmatch(last.name)):
            return True  # whoever knows the hash of a file has the file
        if any(last == file.parent / name for file in self._weights):
            return True
        blobs = all(file.suffix != ".safetensors" for file in self._weights)
        return blobs and last.parent in {file.parent for file in self._weights}

    @cached_property
    def _weights(self) -> set[Path]:
        """Where the weights lie in the end, over all links."""
        return {file.resolve() for file in set(self.checkpoint.files.values())}

    def _inside(self, path: Path) -> bool:
        """Whether a path leads to what is in the checkpoint and not hidden, as passwords are in .git/config."""
        last, root = path.resolve(), self._root
        return last.is_relative_to(root) and not _hidden(last.relative_to(root))

    @cached_property
    def _root(self) -> Path:
        return self.checkpoint.path.resolve()

    @property
    def _cached(self) -> bool:
        """Whether the checkpoint is a snapshot in a hub cache, all of whose files are links into its store."""
        return self._root.parent.name == "snapshots"

    @property
    def _blobs(self) -> Path:
        """The store of the hub cache."""
        return self._root.parent.parent / "blobs"

    @cached_property
    def _without_code(self) -> dict[Path, dict[str, Any]]:
        """Configs beside config.json that name code which does not come along, by their paths."""
        configs = {}
        for name in (name for name in self.names if name.name.endswith("config.json")):
            try:
                config = read_json(self.checkpoint.path / name)
            except CheckpointError:  # it is copied as it is, for whoever reads it to complain about
                continue
            if self._missing_code(config):
                configs[name] = config
        return configs

    def _missing_code(self, config: dict[str, Any]) -> list[str]:
        """Python files that the config names and that do not come along."""
        classes = config.get(_CODE)
        by_use = classes.values() if isinstance(classes, dict) else [classes]
        named = [c for use in by_use for c in (use if isinstance(use, list) else [use]) if c is not None]
        # A class is named as "modeling_x.Model", or as "org/name--modeling_x.Model" in another repository.
        files = {f"{str(c).rpartition('.')[0]}.py" for c in named}
        return sorted(file for file in files if Path(file) not in self.names)


def _copy(source: Path, target: Path) -> None:
    with _open(source) as read, target.open("wb") as written:
        shutil.copyfileobj(read, written)


def _open(source: Path) -> BinaryIO:
    try:
        return source.open("rb")
    except OSError as e:
        raise CheckpointError(f"{source} can't be read: {e.strerror}") from e


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)
