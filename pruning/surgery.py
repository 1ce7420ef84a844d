"""Keep-indices -> a new checkpoint directory, shard by shard.

Where the key axis is comes from the family (`key_rows`), so nothing here knows a tensor's name.
"""

import errno
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from lowkey.publishing import write_json
from modeling.checkpoint import HEAD, Checkpoint, CheckpointError, open_checkpoint, save_shard
from modeling.families import ConfigError
from modeling.layers import RMSNorm
from modeling.sources import INDEX, SINGLE
from modeling.spec import ModelSpec
from modeling.state import DeltaState
from pruning.companions import Companions
from pruning.errors import PruningError
from pruning.finite import finite

Export = Literal["sliced", "masked"]
"""What becomes of the channels that are not kept: their rows are removed, or they are zero and all shapes stay."""


@dataclass(frozen=True)
class Cut:
    """What becomes of the key channels of one linear layer."""

    layer: int
    """Index of the layer in the model."""
    keep: Tensor
    """int64 `[num_k_heads, n]`, ascending channels of each key head."""
    rotation: Tensor | None = None
    """float64 `[num_k_heads, d_k, d_k]`, orthonormal rows: the channels that `keep` counts are these mixtures of the
    checkpoint's own. None where they are its own."""


def write_reduced(
    checkpoint: Checkpoint, cuts: Sequence[Cut], directory: Path, export: Export = "sliced"
) -> ModelSpec:
    """Write the reduced checkpoint's config, weights and the source's other files into `directory`.

    Weights go shard by shard into files of the source's names, so no more than one shard is in memory.

    Args:
        cuts: one for each linear layer, in their order; layers may differ in n.
        directory: exists and is empty.

    Returns:
        The spec of the model that was written: for the masked form that of the source.

    Raises:
        PruningError: `cuts` do not fit the checkpoint, or a tensor holds NaN or Inf.
        CheckpointError: the weights are not what the config says (`check_tensors`).
    """
    check_cuts(checkpoint.spec, cuts)
    checkpoint.check_tensors()
    spec, config = checkpoint.spec, checkpoint.config
    if export == "sliced":
        spec = spec.with_d_k(tuple(cut.keep.shape[1] for cut in cuts))
        config = checkpoint.family.config_with_d_k(config, spec)
    companions = Companions(checkpoint)
    companions.copy(directory)
    write_json(directory / "config.json", companions.without_missing_code(config))
    write_shards(checkpoint, cuts, directory, export)
    return spec


def check_cuts(spec: ModelSpec, cuts: Sequence[Cut]) -> None:
    """Raises PruningError unless `cuts` have distinct, ascending, existing channels for every linear layer and head."""
    if len(cuts) != len(spec.linear_layers):
        raise PruningError(f"keep has {len(cuts)} entries for {len(spec.linear_layers)} layers")
    if [cut.layer for cut in cuts] != list(spec.linear_layers):
        raise PruningError(f"keep is of layers {[cut.layer for cut in cuts]}, not {list(spec.linear_layers)}")
    for cut in cuts:
        layer, m, k = cut.layer, spec.deltas[cut.layer], cut.keep
        if k.ndim != 2 or k.shape[0] != m.num_k_heads or k.shape[1] < 1 or k.dtype != torch.int64:
            raise PruningError(
                f"keep of layer {layer} is {k.dtype} {list(k.shape)}; it must be int64 [{m.num_k_heads}, n], n >= 1"
            )
        if k.min() < 0 or k.max() >= m.d_k or not bool((k.diff(dim=1) > 0).all()):
            raise PruningError(f"keep of layer {layer} must be ascending channels from 0 to {m.d_k - 1}")
        square = (m.num_k_heads, m.d_k, m.d_k)
        if cut.rotation is not None and cut.rotation.shape != square:
            raise PruningError(
                f"rotation of layer {layer} is {list(cut.rotation.shape)}; it must be {list(square)}"
            )


def write_shards(
    checkpoint: Checkpoint, cuts: Sequence[Cut], directory: Path, export: Export = "sliced"
) -> None:
    """Every tensor in its stored dtype, in the source's shards and order, cut or masked where it has a key axis.

    Raises:
        CheckpointError: a tensor can't be read, or is not what the config says.
        PruningError: a tensor holds NaN or Inf.
    """
    cut_of = {cut.layer: cut for cut in cuts}
    rows = checkpoint.key_rows
    total = 0
    for file in dict.fromkeys(checkpoint.files.values()):
        shard: dict[str, Tensor] = {}
        for name in (name for name, holder in checkpoint.files.items() if holder == file):
            tensor = checkpoint.tensor(name)
            if name in rows:
                part = checkpoint.map_of[name]
                assert part.layer is not None
                cut = cut_of[part.layer]
                if cut.rotation is not None:
                    filters = part.role == "filters"
                    tensor = rotate_rows(tensor, rows[name], cut.rotation, filters=filters)
                reduce = keep_rows if export == "sliced" else mask_rows
                tensor = reduce(tensor, rows[name], cut.keep)
            shard[name] = finite(tensor.contiguous(), name, checkpoint.source)
            total += tensor.nbytes
        save_shard(directory / file.name, shard)
    if {file.name for file in checkpoint.files.values()} != {SINGLE}:
        weight_map = {name: file.name for name, file in checkpoint.files.items()}
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def replace_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write other values of the same shapes and dtypes into a checkpoint that is being made, shard by shard."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as f:
            names = list(f.keys())
            if tensors.keys().isdisjoint(names):
                continue
            shard = {name: tensors[name] if name in tensors else f.get_tensor(name) for name in names}
        # What is mapped from the old file stays readable: the new one gets its name, not its place.
        new = file.with_suffix(".new")
        save_shard(new, shard)
        new.replace(file)


def rotate_rows(tensor: Tensor, rows: Tensor, rotation: Tensor, *, filters: bool) -> Tensor:
    """Replace the channels of each head by mixtures of them; all other rows stay.

    Args:
        tensor: `[rows, ...]`.
        rows: row of (set, head, channel), `[sets, num_k_heads, d_k]`.
        rotation: float64 `[num_k_heads, d_k, d_k]`, new channel by old channel.
        filters: the rows are filters of a depthwise convolution, which a mixture can't have one for each of its parts:
            it gets their mean, weighed by the squares of its row of `rotation` (which add up to 1).
    """
    weights = rotation.square() if filters else rotation
    old = tensor[rows].flatten(3).double() if tensor.ndim > 1 else tensor[rows][..., None].double()
    mixed = torch.einsum("hij,shjx->shix", weights, old)
    out = tensor.clone()
    out[rows] = mixed.reshape(*rows.shape, *tensor.shape[1:]).to(tensor.dtype)
    return out


def keep_rows(tensor: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    """Drop the key rows that are not kept; all other rows stay, in their order.

    Args:
        tensor: `[rows, ...]`.
        rows: row of (set, head, channel), `[sets, num_k_heads, d_k]`.
        keep: `[num_k_heads, n]`.
    """
    return tensor[_stays(tensor, rows, keep)]


def mask_rows(tensor: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    """Make zeros of the key rows that are not kept; arguments as for `keep_rows`.

    Queries and keys are normalised over all channels of a head, and the state and what is read from it are sums over
    them, so channels that are zero add nothing: what is left computes what the sliced model does, up to the epsilon of
    the output norm, which a sliced model's larger reads (by the root of d_k / n) meet with less weight.
    """
    masked = tensor.clone()
    masked[~_stays(tensor, rows, keep)] = 0
    return masked


def _stays(tensor: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
    """Whether each row of a tensor is kept or no key row at all, bool `[rows]`."""
    kept = rows.gather(2, keep.expand(rows.shape[0], -1, -1))
    stays = torch.ones(tensor.shape[0], dtype=torch.bool)
    stays[rows.flatten()] = False
    stays[kept.flatten()] = True
    return stays


@torch.no_grad()
def check_runs(directory: Path, expected: ModelSpec, source: str) -> None:
    """Open a checkpoint that was just written and run one forward, holding one layer at a time.

    The spec read back must be the expected one, which also proves fla's arithmetic for d_v: a config from which stock
    loaders would derive another width does not give this spec.

    Args:
        source: what the user knows it was made of; messages name it, for the directory is gone when they are read.

    Raises:
        PruningError: it can't be loaded, its shapes are not the expected ones, or the output is not finite.
        FileNotFoundError: it is gone.
    """
    try:
        _run(directory, expected)
    except (PruningError, CheckpointError, ConfigError) as e:
        if not directory.exists():  # the place was lost, and the checkpoint has no part in it
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(directory)) from e
        reason = str(e).replace(f"{directory}/", "").removeprefix(f"{directory}: ")
        raise PruningError(
            f"{source}: the checkpoint that was made of it does not load or run: {reason}"
        ) from e


def _run(directory: Path, expected: ModelSpec) -> None:
    checkpoint = open_checkpoint(directory)
    if checkpoint.spec != expected:
        raise PruningError(f"the config reads back as {checkpoint.spec}, expected {expected}")
    checkpoint.check_tensors()
    # Longer than one chunk of the chunked form, in two sequences.
    lengths = (70, 3)
    offsets = [0, *itertools.accumulate(lengths)]
    x = checkpoint.tensor(checkpoint.name_of("embeddings.weight"))[
        torch.arange(sum(lengths)) % expected.vocab_size
    ].float()
    for layer in range(len(expected.layers)):
        x, state = checkpoint.block(layer)(x, offsets)
        if isinstance(state, DeltaState):
            m = expected.deltas[layer]
            shape = (len(lengths), m.num_v_heads, m.d_k, m.d_v)
            if state.recurrent.shape != shape:
                raise PruningError(
                    f"layer {layer} has state {list(state.recurrent.shape)}, expected {list(shape)}"
                )
    norm = RMSNorm(expected.hidden_size, expected.norm.eps)
    norm.load_state_dict(checkpoint.parameters("norm."))
    hidden = norm(x)
    head = checkpoint.tensor(checkpoint.name_of("embeddings.weight" if expected.tie_embeddings else HEAD))
    # A large vocabulary's head in float32 can be larger than a shard.
    if not all(bool(F.linear(hidden, rows.float()).isfinite().all()) for rows in head.split(4096)):
        raise PruningError("a forward gives NaN or Inf")
