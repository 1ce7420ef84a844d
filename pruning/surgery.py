"""Keep-indices -> a new checkpoint directory, tensor by tensor.

Where the key axis is comes from the family (`key_rows`), so nothing here knows a tensor's name.
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modeling.checkpoint import REDUCTION, Checkpoint, open_checkpoint, write_json, write_safetensors
from modeling.model import Model
from modeling.spec import ModelSpec
from pruning.errors import PruningError

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


def write_reduced(checkpoint: Checkpoint, keep: Sequence[Tensor], directory: Path) -> ModelSpec:
    """Write the reduced checkpoint's config, weights and the source's other files into `directory`.

    Args:
        keep: per layer int64 `[num_k_heads, n]`, ascending channels of each key head; layers may differ in n.
        directory: exists and is empty.

    Returns:
        The reduced model's spec.

    Raises:
        PruningError: `keep` does not fit the checkpoint.
    """
    check_keep(checkpoint.spec, keep)
    spec = checkpoint.spec.with_d_k(tuple(k.shape[1] for k in keep))
    copy_other_files(checkpoint.path, directory)
    write_json(directory / "config.json", checkpoint.family.config_with_d_k(checkpoint.config, spec))
    write_safetensors(directory, reduced_tensors(checkpoint, keep))
    return spec


def check_keep(spec: ModelSpec, keep: Sequence[Tensor]) -> None:
    """Raises PruningError unless `keep` has distinct, ascending, existing channels for every layer and head."""
    if len(keep) != len(spec.layers):
        raise PruningError(f"keep has {len(keep)} entries for {len(spec.layers)} layers")
    for layer, (k, block) in enumerate(zip(keep, spec.layers, strict=True)):
        m = block.mixer
        if k.ndim != 2 or k.shape[0] != m.num_k_heads or k.shape[1] < 1 or k.dtype != torch.int64:
            raise PruningError(
                f"keep of layer {layer} is {k.dtype} {list(k.shape)}; it must be int64 [{m.num_k_heads}, n], n >= 1"
            )
        if k.min() < 0 or k.max() >= m.d_k or not bool((k.diff(dim=1) > 0).all()):
            raise PruningError(f"keep of layer {layer} must be ascending channels from 0 to {m.d_k - 1}")


def reduced_tensors(checkpoint: Checkpoint, keep: Sequence[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint in its stored dtype, those with a key axis cut to the kept rows.

    Raises:
        PruningError: a tensor that has a key axis is missing.
    """
    layer_of = {
        name: int(m.ours.split(".")[1])
        for m in checkpoint.family.tensors(checkpoint.spec)
        if m.ours.startswith("layers.")
        for name in m.theirs
    }
    rows = checkpoint.family.key_rows(checkpoint.spec)
    missing = sorted(set(rows) - set(checkpoint.files))
    if missing:
        raise PruningError(f"{checkpoint.source}: tensors to cut are missing: {missing[:5]}")
    for name in checkpoint.files:
        tensor = checkpoint.tensor(name)
        if name in rows:
            tensor = keep_rows(tensor, rows[name], keep[layer_of[name]])
        yield name, tensor


def keep_rows(tensor: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    """Drop the key rows that are not kept; all other rows stay, in their order.

    Args:
        tensor: `[rows, ...]`.
        rows: row of (set, head, channel), `[sets, num_k_heads, d_k]`.
        keep: `[num_k_heads, n]`.
    """
    kept = rows.gather(2, keep.expand(rows.shape[0], -1, -1))
    mask = torch.ones(tensor.shape[0], dtype=torch.bool)
    mask[rows.flatten()] = False
    mask[kept.flatten()] = True
    return tensor[mask]


def copy_other_files(source: Path, target: Path) -> None:
    """Copy what is neither weights nor written anew: tokenizer, generation config, licence and the like.

    A link is copied as the file it points to if that lies in the checkpoint or in the hub cache's own store (every
    file of a hub snapshot is such a link). Other links are left out: a checkpoint must not be able to pull files
    of the machine into what its user may publish.
    """
    root = source.resolve()
    inside = [root]
    if root.parent.name == "snapshots":
        inside.append(root.parent.parent / "blobs")
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        hidden = any(part.startswith(".") for part in name.parts)
        if (
            hidden
            or not path.is_file()
            or not any(path.resolve().is_relative_to(folder) for folder in inside)
        ):
            continue
        written_anew = name.name.endswith(".index.json") or str(name) in ("config.json", REDUCTION)
        if written_anew or name.suffix in _WEIGHTS:
            continue
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target / name)


@torch.no_grad()
def reload(directory: Path, expected: ModelSpec) -> Model:
    """Open a checkpoint that was just written, run one forward, and return the model.

    The spec read back must be the expected one, which also proves fla's arithmetic for d_v: a config from which stock
    loaders would derive another width does not give this spec.

    Raises:
        PruningError: the shapes are not the expected ones, or the output is not finite.
        CheckpointError: the directory can't be loaded.
    """
    checkpoint = open_checkpoint(directory)
    if checkpoint.spec != expected:
        raise PruningError(f"{directory}: the config reads back as {checkpoint.spec}, expected {expected}")
    model = checkpoint.load()
    # Longer than one chunk of the chunked form, in two sequences.
    lengths = (70, 3)
    ids = torch.arange(sum(lengths)) % expected.vocab_size
    hidden, state = model(ids, [0, *itertools.accumulate(lengths)])
    if not bool(model.logits(hidden).isfinite().all()):
        raise PruningError(f"{directory}: a forward of the reduced model gives NaN or Inf")
    for layer, (recurrent, block) in enumerate(zip(state.recurrent, expected.layers, strict=True)):
        m = block.mixer
        shape = (len(lengths), m.num_v_heads, m.d_k, m.d_v)
        if recurrent.shape != shape:
            raise PruningError(
                f"{directory}: layer {layer} has state {list(recurrent.shape)}, expected {list(shape)}"
            )
    return model
