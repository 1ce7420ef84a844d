"""Where a checkpoint directory keeps its weights, and whether two stored tensors are the same."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modeling.sources import INDEX, SINGLE, CheckpointError, read_json

_ENTRIES = 2**22
"""Entries of a tensor that are compared at once: a vocabulary's matrix would take gigabytes twice."""


def weight_files(directory: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it.

    Where a single file and an index of others are both there, stock transformers reads the first and vLLM the second,
    so they have to hold the same.

    Raises:
        CheckpointError: there are no weights, a file is missing or can't be read, or the two hold different tensors.
    """
    single = directory / SINGLE
    if not single.exists():
        if not (directory / INDEX).exists():
            raise CheckpointError(
                f"{directory} holds neither {SINGLE} nor {INDEX}; only safetensors checkpoints are read"
            )
        return _indexed(directory)
    files = dict.fromkeys(_names(single), single)
    if (directory / INDEX).exists():
        indexed = _indexed(directory)
        if set(indexed.values()) != {single}:
            _refuse_another(directory, files, indexed)
    return files


def _indexed(directory: Path) -> dict[str, Path]:
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{directory / INDEX} has no weight_map")
    # The base name only: whatever an index says, nothing outside the directory is read.
    files = {name: directory / Path(str(file)).name for name, file in weight_map.items()}
    for file in sorted(set(files.values())):
        if file.suffix != ".safetensors":
            raise CheckpointError(f"{directory / INDEX} names {file.name}, which is no safetensors file")
        if not os.path.exists(file):  # unlike Path.exists, False for a name that is too long
            raise CheckpointError(f"{directory / INDEX} names {file.name}, which is missing")
    return files


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as f:
            return list(f.keys())
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file} can't be read as safetensors: {e}") from e


def _refuse_another(directory: Path, single: dict[str, Path], indexed: dict[str, Path]) -> None:
    """Raises CheckpointError unless the tensors of the index are those of the single file."""
    for name in dict.fromkeys((*single, *indexed)):
        if name not in indexed:
            differs = f"is only in {SINGLE}"
        elif name not in single:
            differs = f"is only in {indexed[name].name}"
        else:
            found = difference(single[name], name, indexed[name], name)
            if found is None:
                continue
            differs = f"differs between {SINGLE} and {indexed[name].name}: {found}"
        raise CheckpointError(
            f"{directory} holds both {SINGLE} and {INDEX}, which hold different weights: tensor {name!r} {differs}. "
            f"transformers would read the first, vLLM the second: remove {INDEX} and its files, or {SINGLE}"
        )


def difference(file: Path, name: str, other_file: Path, other_name: str) -> str | None:
    """How two stored tensors differ, in words; None where their shapes and all their numbers are the same.

    Raises:
        CheckpointError: one can't be read.
    """
    try:
        with safe_open(file, framework="pt") as f, safe_open(other_file, framework="pt") as g:
            one, other = f.get_slice(name), g.get_slice(other_name)
            shape, other_shape = list(one.get_shape()), list(other.get_shape())
            if shape != other_shape:
                return f"their shapes are {shape} and {other_shape}"
            if not shape:
                return None if _apart(f.get_tensor(name), g.get_tensor(other_name)) is None else "they differ"
            rows, most = 0, 0.0
            step = max(1, _ENTRIES // max(1, torch.Size(shape[1:]).numel()))
            for at in range(0, shape[0], step):
                apart = _apart(one[at : at + step], other[at : at + step])
                if apart is not None:
                    rows += int((apart.reshape(len(apart), -1) > 0).any(1).sum())
                    most = max(most, float(apart.max()))
            return f"{rows} of {shape[0]} rows differ, by up to {most:.3g}" if rows else None
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"tensor {name!r} of {file} can't be compared with {other_file}: {e}") from e


def _apart(a: Tensor, b: Tensor) -> Tensor | None:
    """How far two tensors of one shape are apart, entry by entry, or None where they are the same."""
    if a.dtype == b.dtype and torch.equal(a, b):
        return None
    a, b = a.double(), b.double()
    apart = (a - b).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    apart[(a == b) | (a.isnan() & b.isnan())] = 0  # equal infinities have no difference
    return apart if bool(apart.any()) else None
