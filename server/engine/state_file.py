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
"""The dtypes of a pool, as safetensors calls them."""


HostState = dict[str, Tensor]
"""A state in the host's memory: its tensors by name, as a file holds them."""


class StateLoadError(Exception):
    """A saved state that can't be read, or is of another model."""


def layout(pool: StatePool) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of each tensor in a file, by name."""
    tensors = pool.tensors(pool.null_slot)
    return {name: (_DTYPES[t.dtype], list(t.shape)) for name, t in tensors.items()}


def host_tensors(pool: StatePool, slot: int) -> HostState:
    """What a file of the state in `slot` holds: on a CPU the slot itself, else a copy."""
    return {name: t.cpu() for name, t in pool.tensors(slot).items()}


def save_state(tensors: HostState, path: Path, metadata: dict[str, str]) -> None:
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


def read_state(pool: StatePool, path: Path) -> HostState:
    """What `fill` takes, read from a file; in any thread. All of it is in memory then, on a GPU's host in memory that
    the device copies from by itself.

    Raises:
        StateLoadError: the file can't be read, or its state is not one of this pool. Its message goes to the client: it
            names no path.
    """
    try:
        loaded = load_file(path)
    except OSError as e:
        raise StateLoadError("the saved state can't be read; it may have expired or been deleted") from e
    except SafetensorError as e:
        raise StateLoadError(f"the saved state can't be read: {e}") from e
    ours = pool.tensors(pool.null_slot)
    if loaded.keys() != ours.keys():
        odd = min(loaded.keys() ^ ours.keys())
        raise StateLoadError(f"the saved state is of another model: {odd} is in one of the two only")
    for name, t in ours.items():
        theirs = loaded[name]
        if (theirs.shape, theirs.dtype) != (t.shape, t.dtype):
            raise StateLoadError(
                f"the saved state is of another model: {name} is {theirs.dtype} {list(theirs.shape)}, "
                f"and {t.dtype} {list(t.shape)} is needed"
            )
    # What the library gives is the file itself, of which nothing has been read yet.
    pinned = ours[name].is_cuda
    return {name: t.pin_memory() if pinned else t.clone() for name, t in loaded.items()}


def fill(pool: StatePool, slot: int, tensors: HostState) -> None:
    """Copy what `read_state` has read into a slot, behind all work that the device has been given already."""
    for name, t in pool.tensors(slot).items():
        t.copy_(tensors[name], non_blocking=True)
