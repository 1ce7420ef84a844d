"""One request's state as a safetensors file: `layers.{i}.recurrent` `[num_v_heads, d_k, d_v]` and
`layers.{i}.conv` `[conv_channels, conv_kernel - 1]`."""

import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling.state import StatePool

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""What safetensors calls the dtypes of a pool."""


class StateFileError(Exception):
    """A saved state that can't be read, or is of another model."""


def layout(pool: StatePool) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of each tensor in a file, by name."""
    tensors = pool.tensors(pool.null_slot)
    return {name: (_DTYPES[t.dtype], list(t.shape)) for name, t in tensors.items()}


def host_tensors(pool: StatePool, slot: int) -> dict[str, Tensor]:
    """What a file of the state in `slot` holds: on a CPU the slot itself, else a copy."""
    return {name: t.cpu() for name, t in pool.tensors(slot).items()}


def save_state(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a state and wait for the disk; a file of that name is replaced at once or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        save_file(tensors, partial, metadata)
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        os.replace(partial, path)
    except SafetensorError as e:  # how the library reports a full disk
        raise OSError(f"{path}: {e}") from e
    finally:
        partial.unlink(missing_ok=True)


def load_state(pool: StatePool, slot: int, path: Path) -> None:
    """Fill `slot` from a file. Raises StateFileError, and has then written nothing. Its message goes to the client: it
    names no path."""
    try:
        loaded = load_file(path)
    except OSError as e:
        raise StateFileError("the saved state can't be read; it may have expired or been deleted") from e
    except SafetensorError as e:
        raise StateFileError(f"the saved state can't be read: {e}") from e
    ours = pool.tensors(slot)
    if loaded.keys() != ours.keys():
        odd = min(loaded.keys() ^ ours.keys())
        raise StateFileError(f"the saved state is of another model: {odd} is in one of the two only")
    for name, t in ours.items():
        theirs = loaded[name]
        if (theirs.shape, theirs.dtype) != (t.shape, t.dtype):
            raise StateFileError(
                f"the saved state is of another model: {name} is {theirs.dtype} {list(theirs.shape)}, "
                f"and {t.dtype} {list(t.shape)} is needed"
            )
    for name, t in ours.items():
        t.copy_(loaded[name])
