"""The files of a checkpoint beside its weights, and which of them come along into one that is made of it."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lowkey.publishing import write_json
from modeling.checkpoint import REDUCTION, Checkpoint
from modeling.sources import CheckpointError, read_json

RECOVERY = "recovery.json"
"""What `lowkey-prune recover` writes about a run, beside the weights that it trained."""
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
_TOKENIZER = Path("tokenizer.json")
_MOST_LINKS = 40
"""Links over links that are followed; Linux follows as many."""


@dataclass(frozen=True)
class Companions:
    """What comes along of a checkpoint's other files: tokenizer, generation config, licence and the like.

    Weights in other formats, hidden files and what is written anew stay behind. A checkpoint must not be able to pull
    files of the machine into what its user may publish, so a link is followed only if it leads, directly or over other
    links, into the checkpoint, into the hub cache's own store (every file of a hub snapshot is such a link), or into a
    folder through which the checkpoint's own weights came.
    """

    checkpoint: Checkpoint

    @property
    def names(self) -> list[Path]:
        """Paths of what comes along, relative to the checkpoint."""
        return [name for name, follow in self._found.items() if follow]

    @property
    def left_out(self) -> list[Path]:
        """Links that are not followed or lead nowhere."""
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
                _copy(self.checkpoint.path / name, directory / name)

    def without_missing_code(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config without the names of classes whose code does not come along: nothing could load it."""
        return {key: value for key, value in config.items() if key != _CODE or not self._missing_code(config)}

    def notes(self) -> Iterator[str]:
        """Says what the output will lack."""
        if self.left_out:
            yield (
                f"note: links that lead out of the checkpoint or nowhere are left out: "
                f"{', '.join(map(str, self.left_out))}"
            )
        if _TOKENIZER not in self.names:
            source = self.checkpoint.source
            linked = f"tokenizer.json of {source} is a link out of the checkpoint"
            reason = linked if _TOKENIZER in self.left_out else f"{source} has no tokenizer.json"
            yield f"note: {reason}, so the output has none: lowkey-serve refuses it until one is put there"
        without = {name: self._missing_code(config) for name, config in self._without_code.items()}
        without[Path("config.json")] = self._missing_code(self.checkpoint.config)
        for name, files in without.items():
            if files:
                yield f"note: {_CODE} of {name} is left out: the code that it names is not there ({', '.join(files)})"

    @cached_property
    def _found(self) -> dict[Path, bool]:
        """Files and links beside the weights, relative to the checkpoint, and whether they come along."""
        root = self.checkpoint.path
        found = {}
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root)
            anew = name.name.endswith(".index.json") or str(name) in _WRITTEN_ANEW
            if _hidden(name) or anew or name.suffix in _WEIGHTS or not (path.is_file() or path.is_symlink()):
                continue
            found[name] = path.is_file() and self._safe(path, name)
        return found

    def _safe(self, path: Path, name: Path) -> bool:
        places = _places(path)
        if self._visible(places[-1]):
            return True
        return any(
            place in (folder / place.name, folder / name)
            for place in places[1:]
            for folder in self._trusted
            if not place.name.startswith(".")
        )

    def _visible(self, place: Path) -> bool:
        """Whether a real path lies in the checkpoint and is not hidden there, as what git keeps is."""
        root = self.checkpoint.path.resolve()
        return place.is_relative_to(root) and not _hidden(place.relative_to(root))

    @cached_property
    def _trusted(self) -> set[Path]:
        """Folders outside the checkpoint through which its weights came, their own links resolved."""
        root = self.checkpoint.path.resolve()
        folders = {
            place.parent for file in set(self.checkpoint.files.values()) for place in _places(file)[1:]
        }
        if root.parent.name == "snapshots":
            folders.add(root.parent.parent / "blobs")
        return {folder for folder in folders if not self._visible(folder)}

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
        files = {
            f"{str(c).rpartition('.')[0]}.py" for c in named
        }  # "modeling_x.Model"; "org/name--modeling_x.Model"
        return sorted(file for file in files if Path(file) not in self.names)


def _copy(source: Path, target: Path) -> None:
    try:
        read = source.open("rb")
    except OSError as e:
        raise CheckpointError(f"{source} can't be read: {e.strerror}") from e
    with read, target.open("wb") as written:
        shutil.copyfileobj(read, written)


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _places(path: Path) -> list[Path]:
    """The path and where it leads, link by link, each in its real folder."""
    places = []
    for _ in range(_MOST_LINKS):
        path = path.parent.resolve() / path.name
        places.append(path)
        if not path.is_symlink():
            break
        path = path.parent / path.readlink()
    return places
