"""Checkpoint directories in Hugging Face format: open, read by tensor, hash, write.

Only safetensors are read, one tensor at a time.
"""

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowkey.publishing import write_json
from lowkey.words import counted, writable
from modeling.families import ConfigError, Family, TensorMap, family_of, key_rows
from modeling.families.base import token_ids
from modeling.layers import Block
from modeling.model import Model
from modeling.sources import (
    INDEX,
    SINGLE,
    checkpoint_sha256,
    has_weights,
    local_directory,
    read_json,
    refuse_gguf,
)
from modeling.sources import CheckpointError as CheckpointError
from modeling.spec import ModelSpec
from modeling.weights import difference, weight_files

REDUCTION = "state_reduction.json"
GENERATION = "generation_config.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights that are read, by safetensors' names."""
HEAD = "lm_head.weight"
"""The output projection, as every family calls it. It may be stored also where it is tied to the embeddings."""
_TERMS = ["LICENSE*", "LICENCE*", "license*", "NOTICE*", "Notice*", "COPYING*", "*.md"]
"""A model's licence, what it asks to be passed on, and its card."""
HUB_FILES = ["*.json", "*.jinja", "*.safetensors", "*.txt", "*.model", *_TERMS]
"""What is taken from a hub: never code."""


class Checkpoint:
    """A readable checkpoint directory."""

    def __init__(self, path: Path, source: str | None = None, *, hub_id: str | None = None) -> None:
        self.path = path
        self.source = source or str(path)
        """What the user called it: a path or a hub id."""
        self.hub_id = hub_id
        """`org/name` of a checkpoint that came from the hub; None for a directory."""
        self.config: dict[str, Any] = read_json(path / "config.json")
        self.family: Family = family_of(self.config)
        self.spec: ModelSpec = with_generation_eos(self.family.spec(self.config), path)
        self._headers: dict[Path, dict[str, tuple[str, tuple[int, ...]]]] = {}

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the safetensors file that holds it (`weight_files`)."""
        return weight_files(self.path)

    @property
    def has_weights(self) -> bool:
        """Whether there are weights beside the config, which is all that some questions need."""
        return has_weights(self.path)

    @cached_property
    def reduction(self) -> dict[str, Any] | None:
        """What `lowkey-prune` wrote about a reduced checkpoint, or None for any other."""
        file = self.path / REDUCTION
        return read_json(file) if file.exists() else None

    @property
    def method(self) -> str | None:
        """How a reduced checkpoint was made, as text that can be shown: its method, and whether the channels that it
        names are masked only. None for any other checkpoint."""
        if self.reduction is None:
            return None
        masked = " (masked)" if self.reduction.get("export") == "masked" else ""
        return f"{writable(self.reduction.get('method'))}{masked}"

    @cached_property
    def sha256(self) -> str:
        """Hash of the config and all weights. Raises CheckpointError if a file can't be read."""
        try:
            return checkpoint_sha256(self.path, self.files.values())
        except OSError as e:
            raise CheckpointError(f"{self.path} can't be read: {e}") from e

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype and shape, which the config accounts for.

        Raises:
            CheckpointError: it is missing, can't be read, has another shape than the config says, or is quantised.
        """
        file = self._file_of(name)
        with _readable(file, name), safe_open(file, framework="pt") as f:
            part = f.get_slice(name)
            self._check_tensor(name, str(part.get_dtype()), tuple(part.get_shape()))
            tensor: Tensor = f.get_tensor(name)
        return tensor

    def dtype_and_shape(self, name: str) -> tuple[str, list[int]]:
        """A tensor's dtype as safetensors calls it (`BF16`, a key of `FLOATS`) and its shape, from the file's header
        alone.

        Raises:
            CheckpointError: as `tensor`.
        """
        file = self._file_of(name)
        if file not in self._headers:
            # Read once: the header of a file with thousands of experts takes milliseconds each time.
            with _readable(file, name), safe_open(file, framework="pt") as f:
                parts = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118
                self._headers[file] = {
                    k: (str(p.get_dtype()), tuple(p.get_shape())) for k, p in parts.items()
                }
        if name not in self._headers[file]:
            raise CheckpointError(f"{file}: tensor {name!r} can't be read: the file does not contain it")
        dtype, shape = self._headers[file][name]
        self._check_tensor(name, dtype, shape)
        return dtype, list(shape)

    def shape_with_d_k(self, name: str, d_k: Mapping[int, int]) -> list[int]:
        """The shape that a tensor has where the linear layers have so many key channels per head, by layer.

        Raises:
            CheckpointError: as `tensor`.
        """
        _, shape = self.dtype_and_shape(name)
        layer = self.map_of[name].layer if name in self.key_rows else None
        if layer is not None and layer in d_k:
            sets, heads, now = self.key_rows[name].shape
            shape[0] += sets * heads * (d_k[layer] - now)
        return shape

    def _file_of(self, name: str) -> Path:
        if name not in self.files:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing")
        return self.files[name]

    def _check_tensor(self, name: str, dtype: str, shape: tuple[int, ...]) -> None:
        if name not in self._stored_shapes and self.is_ours(name):
            raise CheckpointError(f"{self.path}: the config does not account for tensor {name!r}")
        expected = self._stored_shapes.get(name)
        if expected is not None and shape not in expected:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has shape {list(shape)}, the config says {list(expected[0])}"
            )
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is {dtype}, and weights are read as {', '.join(FLOATS)}; quantised ones "
                "have scales that span rows that pruning would cut: give the checkpoint that they were made from"
            )

    @cached_property
    def maps(self) -> list[TensorMap]:
        """Every tensor of our model, and the tensors of the checkpoint that it is made of."""
        return self.family.tensors(self.spec, self.files if self.has_weights else ())

    @cached_property
    def key_rows(self) -> dict[str, Tensor]:
        """Where the key axis is in the checkpoint's tensors (`modeling.families.key_rows`)."""
        return key_rows(self.spec, self.maps)

    def is_ours(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is one that the config accounts for, not one that is only copied."""
        return not name.startswith(self.family.ignored)

    @cached_property
    def map_of(self) -> dict[str, TensorMap]:
        """What each of the checkpoint's tensors is in our model, by its name."""
        return {name: m for m in self.maps for name in m.theirs}

    @cached_property
    def _stored_shapes(self) -> dict[str, list[tuple[int, ...]]]:
        """The shapes that each tensor that the config accounts for may have, by name."""
        stored: dict[str, list[tuple[int, ...]]] = {}
        for m in self.maps:
            stored |= m.stored_shapes(self._shapes[m.ours])
        if self.spec.tie_embeddings:
            stored[HEAD] = [tuple(self._shapes["embeddings.weight"])]
        return stored

    def load(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
        """The model, in eval mode. A_log, dt_bias and norm weights are float32 whatever `dtype` is.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape than the config says.
        """
        self.check_tensors()
        with torch.device("meta"):
            model = Model(self.spec)
        state = self.parameters(dtype=dtype, device=device)
        if self.spec.tie_embeddings:
            state["lm_head.weight"] = state["embeddings.weight"]
        model.load_state_dict(state, assign=True)
        if self.spec.tie_embeddings:
            model.lm_head.weight = model.embeddings.weight  # `assign` has made two parameters of one tensor
        return model.eval().requires_grad_(False)

    def block(self, layer: int, *, device: torch.device | str = "cpu") -> Block:
        """One layer of the model for a forward in float32, without the others. It computes what `load` gives.

        Experts stay in their stored dtype, and on the CPU in the mapped file where they lie there as they are used: in
        float32 those of one layer can be larger than all memory.

        Raises:
            CheckpointError: a tensor is missing or of another shape than the config says.
        """
        with torch.device("meta"):
            block = Block(self.spec.layers[layer], self.spec.hidden_size, layer)
        prefix = f"layers.{layer}."
        state = self.parameters(prefix, device=device, stored_experts=True)
        block.load_state_dict(state, assign=True)
        return block.eval().requires_grad_(False)

    def parameters(
        self,
        prefix: str = "",
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        stored_experts: bool = False,
    ) -> dict[str, Tensor]:
        """The parameters of the part of our model called `prefix`, by their names within it (of the whole: "").

        Args:
            stored_experts: leave experts in the dtype that they are stored in, and not to be written to.

        Raises:
            CheckpointError: a tensor is missing or of another shape than the config says.
        """
        types = self.parameter_types(dtype)
        parameters: dict[str, Tensor] = {}
        for m in self.maps:
            if not m.ours.startswith(prefix):
                continue
            shape, kind = types[m.ours]
            ours = m.ours.removeprefix(prefix)
            if stored_experts and m.role == "experts":
                if m.is_one:
                    parameters[ours] = self.tensor(m.theirs[0]).to(device)  # on the CPU not even a copy
                    continue
                stored = (FLOATS[self.dtype_and_shape(name)[0]] for name in m.theirs)
                kind = functools.reduce(torch.promote_types, stored)
            parts = (self.tensor(name) for name in m.theirs)
            parameters[ours] = m.join(parts, shape, kind, device)
        return parameters

    def parameter_types(self, dtype: torch.dtype) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Shape and dtype of each of our parameters when the model is loaded in `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        return {
            m.ours: (self._shapes[m.ours], wide if m.role in ("norm", "decay") else dtype) for m in self.maps
        }

    @cached_property
    def _shapes(self) -> dict[str, torch.Size]:
        with torch.device("meta"):
            return {name: p.shape for name, p in Model(self.spec).named_parameters()}

    def check_tensors(self) -> None:
        """Look at the headers of all weights, before work that would only find out later.

        Raises:
            CheckpointError: a tensor is missing, unexpected, quantised, or of another shape than the config says, or
                the config ties the embeddings to a head that is stored with other numbers.
        """
        unexpected = sorted(filter(self.is_ours, set(self.files) - set(self._stored_shapes)))
        if unexpected:
            found = counted(len(unexpected), "tensor")
            raise CheckpointError(
                f"{self.path}: {found} that the config does not account for: {unexpected[:5]}"
            )
        for m in self.maps:
            for name in m.theirs:
                self.dtype_and_shape(name)
        if self._head_differs is not None:
            raise CheckpointError(
                f"{self.path}: config.json says tie_word_embeddings=true, but {HEAD} is stored and is not "
                f"{self.name_of('embeddings.weight')}: {self._head_differs}. transformers would use the head, vLLM the "
                "embeddings: set tie_word_embeddings to false in config.json to keep the head, or remove "
                f"{HEAD} to use the embeddings"
            )

    @cached_property
    def _head_differs(self) -> str | None:
        """How a head that is stored differs from the embeddings that it is tied to; None where there is none."""
        if not self.spec.tie_embeddings or HEAD not in self.files:
            return None
        self.dtype_and_shape(HEAD)
        name = self.name_of("embeddings.weight")
        return difference(self.files[HEAD], HEAD, self.files[name], name)

    def name_of(self, ours: str) -> str:
        """The checkpoint's name of a tensor that is one of ours and one of theirs as well."""
        ((name,),) = (m.theirs for m in self.maps if m.ours == ours)
        return name


@contextmanager
def _readable(file: Path, name: str) -> Iterator[None]:
    """Raises CheckpointError, with the names, where a tensor's file can't be read inside the block."""
    try:
        yield
    except (SafetensorError, OSError) as e:
        raise CheckpointError(f"{file}: tensor {name!r} can't be read: {e}") from e


def with_generation_eos(spec: ModelSpec, directory: Path) -> ModelSpec:
    """The spec with the end tokens of the directory's generation_config.json, if it has one, behind its own.

    A chat model's turn ends with a token that its config.json often does not name.

    Raises:
        CheckpointError, ConfigError: the file is no JSON object, or its eos_token_id is no token ids.
    """
    file = directory / GENERATION
    if not file.exists():
        return spec
    try:
        more = token_ids(read_json(file), "eos_token_id", None)
    except ConfigError as e:
        raise ConfigError(str(e).replace("config.json", GENERATION, 1)) from e
    return replace(spec, eos_token_ids=tuple(dict.fromkeys((*spec.eos_token_ids, *more))))


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open a local directory, or download a hub id (`org/name`, optionally `org/name@revision`).

    Raises:
        CheckpointError: neither a directory nor a hub id (`local_directory`), or the download fails.
    """
    path = local_directory(source)
    if path is not None:
        refuse_gguf(path)
        return Checkpoint(path, str(source))
    name, _, revision = str(source).partition("@")
    from huggingface_hub import snapshot_download

    try:
        local = snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES)
    except Exception as e:  # the client lets errors of several HTTP libraries through
        raise CheckpointError(f"{source}: no such directory, and the download failed: {e}") from e
    return Checkpoint(Path(local), str(source), hub_id=name)


def export_tensors(model: Model, family: Family, names: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """The model's parameters under the family's own names and shapes; `names` as in `Family.tensors`."""
    state = model.state_dict()
    for m in family.tensors(model.spec, names):
        yield from zip(m.theirs, m.split(state[m.ours]), strict=True)


def save_shard(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file as transformers wants it, contiguous tensors only."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors leaves it readable by its owner only


def write_safetensors(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], *, shard_bytes: int = 2**31
) -> None:
    """Write tensors as they come, holding at most one shard (and the next tensor) in memory."""
    shards: list[dict[str, Tensor]] = [{}]
    sizes: dict[str, int] = {}
    names: list[list[str]] = []
    total = 0

    def flush() -> None:
        shard = shards[0]
        names.append(list(shard))
        save_shard(directory / f"shard-{len(names):05d}.safetensors", shard)
        shards[0] = {}

    held = 0
    for name, tensor in tensors:
        if shards[0] and held + tensor.nbytes > shard_bytes:
            flush()
            held = 0
        shards[0][name] = tensor.contiguous()
        sizes[name] = tensor.nbytes
        held += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(names) == 1:
        (directory / "shard-00001.safetensors").rename(directory / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, shard_names in enumerate(names, start=1):
        file = f"model-{i:05d}-of-{len(names):05d}.safetensors"
        (directory / f"shard-{i:05d}.safetensors").rename(directory / file)
        weight_map |= dict.fromkeys(shard_names, file)
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
