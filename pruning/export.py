"""Whether a checkpoint that was written is what other software will take it for: each tensor, the index, the config.

Other loaders do not find out. vLLM leaves a projection that it does not find at random without an error, and takes the
rows of a convolution that it expects whatever the tensor holds.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from modeling.checkpoint import FLOATS, HEAD, Checkpoint
from modeling.sources import INDEX, SINGLE, read_json
from pruning.errors import PruningError
from pruning.surgery import Cut

_NAMED = 5
"""Tensors that a message names, at most."""


@dataclass(frozen=True)
class Stored:
    """What a safetensors header says about a tensor."""

    dtype: str
    shape: tuple[int, ...]
    file: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * FLOATS[self.dtype].itemsize


def check_written(source: Checkpoint, directory: Path, cuts: Sequence[Cut] = ()) -> None:
    """Compare the headers of all weights in `directory` with the source's.

    Args:
        cuts: what was cut out; without any, nothing may differ.

    Raises:
        PruningError: a tensor is missing, is one too many, or has another dtype or shape than the source's without the
            rows that were cut; or the index does not say where the tensors are.
    """
    found = _stored(source, directory)
    expected = dict(_expected(source, cuts))
    where = f"{source.source}: what was written of it"
    for names, what in (
        (sorted(expected.keys() - found.keys()), "lacks"),
        (sorted(found.keys() - expected.keys()), "has what the source has not:"),
    ):
        if names:
            raise PruningError(f"{where} {what} {', '.join(names[:_NAMED])} ({len(names)} in all)")
    if source.spec.tie_embeddings and HEAD in found:
        # Training stores a copy of the embeddings as one, in their dtype.
        dtypes = {expected[HEAD][0], expected[source.name_of("embeddings.weight")][0]}
        if found[HEAD].dtype in dtypes:
            expected[HEAD] = (found[HEAD].dtype, expected[HEAD][1])
    for name, (dtype, shape) in expected.items():
        if (found[name].dtype, found[name].shape) != (dtype, shape):
            raise PruningError(
                f"{where} has {name} as {found[name].dtype} {list(found[name].shape)}; it must be {dtype} {list(shape)}"
            )
    _check_index(directory, found, where)


def _expected(source: Checkpoint, cuts: Sequence[Cut]) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Name, dtype and shape of every tensor that has to be there."""
    kept = {cut.layer: cut.keep.shape[1] for cut in cuts}
    for name in source.files:
        dtype, _ = source.dtype_and_shape(name)
        yield name, (dtype, tuple(source.shape_with_d_k(name, kept)))


def _stored(source: Checkpoint, directory: Path) -> dict[str, Stored]:
    """Every tensor of the safetensors files in `directory`, by name."""
    found: dict[str, Stored] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118
                    if name in found:
                        raise PruningError(
                            f"{source.source}: tensor {name} was written to {found[name].file} and to {file.name}"
                        )
                    part = f.get_slice(name)
                    found[name] = Stored(str(part.get_dtype()), tuple(part.get_shape()), file.name)
        except SafetensorError as e:
            raise PruningError(f"{source.source}: {file.name}, written of it, can't be read: {e}") from e
    return found


def _check_index(directory: Path, found: Mapping[str, Stored], where: str) -> None:
    """Raises PruningError unless there is either one file of the usual name or an index that says where tensors are."""
    files = {stored.file for stored in found.values()}
    if not (directory / INDEX).exists():
        if files != {SINGLE}:
            raise PruningError(f"{where} is in {', '.join(sorted(files)[:_NAMED])} without {INDEX}")
        return
    index = read_json(directory / INDEX)
    if index.get("weight_map") != {name: stored.file for name, stored in found.items()}:
        raise PruningError(f"{where} has an {INDEX} that does not say where its tensors are")
    size = sum(stored.nbytes for stored in found.values())
    if index.get("metadata", {}).get("total_size") != size:
        raise PruningError(f"{where} has an {INDEX} whose total_size is not {size}")


def config_changes(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What differs between two configs, a line each: `text_config.linear_key_head_dim 128 => 64`."""
    lines = []
    for key in dict.fromkeys((*before, *after)):
        name = f"{prefix}{key}"
        if key not in after:
            lines.append(f"{name} removed")
        elif key not in before:
            lines.append(f"{name} added: {after[key]!r:.200}")
        elif before[key] == after[key]:
            continue
        elif isinstance(before[key], Mapping) and isinstance(after[key], Mapping):
            lines += config_changes(before[key], after[key], f"{name}.")
        else:
            lines.append(f"{name} {before[key]!r:.200} => {after[key]!r:.200}")
    return lines
