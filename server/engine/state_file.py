"""One request's state as a safetensors file: of a linear layer `layers.{i}.recurrent` `[num_v_heads, d_k, d_v]`,
`layers.{i}.conv` `[conv_channels, conv_kernel - 1]`, and `layers.{i}.scales` `[num_v_heads, d_v]` beside a recurrent
state in int8; of a softmax attention layer `layers.{i}.keys` and `layers.{i}.values` `[tokens, num_kv_heads,
head_dim]`."""

import os
import secrets
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modeling.state import StatePool
from server.wire.messages import StateLayout, layout_after

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}
"""The dtypes of a pool, as safetensors calls them."""
_NAMES = {name: dtype for dtype, name in _DTYPES.items()}


class StateLoadError(Exception):
    """A saved state that can't be read, or is of another model."""


def layout(pool: StatePool) -> StateLayout:
    """What a file holds, for a state without tokens."""
    tensors = pool.tensors(pool.null_slot, 0)
    return {name: (_DTYPES[t.dtype], list(t.shape)) for name, t in tensors.items()}


def host_tensors(pool: StatePool, slot: int, tokens: int) -> dict[str, Tensor]:
    """The tensors of the state of `tokens` tokens in `slot`, by their names in a file: on a CPU those of the slot
    itself, else copies, which are waited for. Raises MemoryError."""
    if pool.device.type == "cpu":
        return pool.tensors(slot, tokens)
    tensors = pool.to_host(slot, tokens)
    torch.cuda.current_stream(pool.device).synchronize()
    return tensors


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


def load_state(pool: StatePool, slot: int, path: Path, tokens: int) -> None:
    """Read a state from a file into a slot, on a GPU behind all work that the device has been given already.

    Args:
        tokens: how many the state has seen; the slot has pages for them.

    Raises:
        StateLoadError: the file can't be read, or its state is not one of this pool. Its message goes to the client: it
            names no path.
        MemoryError: the host or the device has no memory left for it.
    """
    try:
        _read_ahead(path)
        loaded = load_file(path)
    except OSError as e:
        raise StateLoadError("the saved state can't be read; it may have expired or been deleted") from e
    except SafetensorError as e:
        raise StateLoadError(f"the saved state can't be read: {e}") from e
    ours = layout_after(layout(pool), tokens)
    if loaded.keys() != ours.keys():
        odd = min(loaded.keys() ^ ours.keys())
        raise StateLoadError(f"the saved state is of another model: {odd} is in one of the two only")
    for name, (dtype, needed) in ours.items():
        theirs = loaded[name]
        if (list(theirs.shape), _DTYPES.get(theirs.dtype)) != (needed, dtype):
            raise StateLoadError(
                f"the saved state is of another model: {name} is {theirs.dtype} {list(theirs.shape)}, "
                f"and {_NAMES[dtype]} {needed} is needed"
            )
    pool.load(slot, loaded, tokens)


def _read_ahead(path: Path) -> None:
    """Have the system read a file into memory. Python's own reads let the steps' thread run meanwhile; the library
    would keep the interpreter to itself for as long as the disk takes to open the file."""
    chunk = bytearray(2**20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(chunk):
            pass
