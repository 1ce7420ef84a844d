"""What a checkpoint family says about itself, and how the two naming schemes are joined."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from modeling.spec import AttentionSpec, DeltaSpec, MLPSpec, ModelSpec, MoESpec

Config = Mapping[str, Any]

MOST = 2**31 - 1
"""No number of any config is larger; a config is from a stranger, and what it says is built."""
MOST_LAYERS = 1024
MOST_CONV = 64
MOST_WEIGHTS = 2**40
"""Entries of one matrix, at most."""
MOST_ROWS = 2**24
"""Rows of the input projections of all layers, at most: some families have an order of them in memory."""
MOST_EXPERTS = 2**17
"""Experts of all layers, at most: each may have tensors, and names, of its own."""


class ConfigError(ValueError):
    """A config.json that we can't run; the message names the key, its value and what would be right."""


Role = Literal[
    "embeddings",
    "in_proj",
    "filters",
    "filter_bias",
    "decay",
    "out_proj",
    "ffn",
    "router",
    "experts",
    "norm",
    "head",
]
"""What a tensor is for: `in_proj` and `out_proj` are a mixer's projections, `filters` and `filter_bias` its short
convolution's, `decay` what its decay is made of, `norm` the weight of any norm, `ffn` a matrix of a feed-forward
that all tokens take, `router` what chooses among experts, `experts` one matrix of each of them."""


@dataclass(frozen=True)
class TensorMap:
    """How one of our tensors is made of a checkpoint's: they are concatenated along the first axis, then put in order.

    What else may lie between the two belongs into these methods: nothing else knows how the checkpoint's tensors lie.
    """

    layer: int | None
    """Index of the layer that it belongs to; None for what belongs to none."""
    role: Role
    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    """The rows that each of theirs makes up of their concatenation."""
    order: Tensor | None = field(default=None, compare=False)
    """Row of the concatenation that each of our rows is, int64; None where ours are in that order."""
    offset: float = 0.0
    """What is added to theirs: 1 for norms that are stored as what their weight differs from 1 by."""
    stacked: bool = False
    """Whether ours has one axis more in front, of experts, along which theirs are stacked without it."""

    @property
    def is_one(self) -> bool:
        """Whether ours is one of theirs as it is stored."""
        return len(self.theirs) == 1 and self.order is None and not self.offset

    def stored_shapes(self, shape: torch.Size) -> dict[str, list[tuple[int, ...]]]:
        """The shapes that each of theirs may have, by name, for our tensor of `shape`."""
        rest = self._rest(shape)
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for name, n in zip(self.theirs, self.rows, strict=True):
            shapes[name] = [(n, *rest)]
            if self.role == "filters":
                # A depthwise convolution's; some checkpoints have an axis for its one input channel.
                shapes[name].append((n, 1, *rest))
        return shapes

    def join(
        self, parts: Iterable[Tensor], shape: torch.Size, dtype: torch.dtype, device: torch.device | str
    ) -> Tensor:
        """Makes our tensor, of `shape`, of theirs, which are taken one at a time, so that no two are in memory."""
        joined = torch.empty(sum(self.rows), *self._rest(shape), dtype=dtype, device=device)
        for part, rows in zip(parts, joined.split(list(self.rows)), strict=True):
            rows.copy_(part.reshape(rows.shape))
        if self.offset:
            joined += self.offset
        if self.order is not None:
            joined = joined[self.order.to(device)]
        return joined.view(shape)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Makes theirs of our tensor."""
        if self.stacked:
            tensor = tensor.flatten(0, 1)
        if self.order is not None:
            tensor = tensor[self.order.argsort().to(tensor.device)]
        if self.offset:
            tensor = tensor - self.offset
        parts = tensor.split(list(self.rows))
        return [part[:, None, :] if self.role == "filters" else part for part in parts]

    def row_of(self, row: Tensor) -> Tensor:
        """Row of the concatenation that each of our rows `row` is, int64."""
        return row if self.order is None else self.order[row]

    def _rest(self, shape: torch.Size) -> tuple[int, ...]:
        """The axes of each of theirs behind the first."""
        return tuple(shape[2:] if self.stacked else shape[1:])


class Family(Protocol):
    """One kind of public checkpoint."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """The values of `model_type` in a config.json that name it."""
        ...

    @property
    def ignored(self) -> tuple[str, ...]:
        """Beginnings of the names of tensors that are no part of our model. Surgery copies them as they are."""
        ...

    def spec(self, config: Config) -> ModelSpec:
        """Shapes of the checkpoint. Raises ConfigError for an option that we don't run."""
        ...

    def tensors(self, spec: ModelSpec, names: Collection[str] = ()) -> list[TensorMap]:
        """Every tensor of our model, and the tensors of the checkpoint that it is made of.

        Args:
            names: What the checkpoint's tensors are called, where a family has several layouts; without any, the layout
                that its publishers use.
        """
        ...

    def config_with_d_k(self, config: Config, spec: ModelSpec) -> dict[str, Any]:
        """The checkpoint's config for the shapes in `spec`, which differ from it in d_k only. One d_k for the whole
        model gives a config that the stock loaders read; a d_k per layer is written as a list, which they refuse."""
        ...


def key_rows(spec: ModelSpec, maps: Iterable[TensorMap]) -> dict[str, Tensor]:
    """Where the key axis is: tensor name of the checkpoint -> row index of (set, head, channel), int64
    `[sets, num_k_heads, d_k]`. Rows in none of the sets are not keys.

    Our projections and filters begin with the rows of q and of k, head by head; a tensor that holds both has two sets.
    """
    found: dict[str, Tensor] = {}
    for m in maps:
        if m.layer not in spec.deltas or m.role not in ("in_proj", "filters", "filter_bias"):
            continue
        mixer = spec.deltas[m.layer]
        rows = m.row_of(torch.arange(2 * mixer.key_dim)).view(2, mixer.num_k_heads, mixer.d_k)
        start = 0
        for name, n in zip(m.theirs, m.rows, strict=True):
            here = [sets - start for sets in rows if start <= int(sets.min()) and int(sets.max()) < start + n]
            if here:
                found[name] = torch.stack(here)
            start += n
    return found


def refuse_quantised(config: Config) -> None:
    """Raises ConfigError for a checkpoint whose weights are not in floating point."""
    found = config.get("quantization_config")
    if found is not None:
        raise ConfigError(
            f"config.json: quantization_config={found!r:.200} must be absent: scales of quantised weights span rows "
            "that reduction would cut. Reduce the bf16 original, then quantise what comes out"
        )


def option(config: Config, key: str, default: Any, supported: tuple[Any, ...]) -> Any:
    """`config[key]`, which must be one of `supported`."""
    value = config.get(key, default)
    if value not in supported:
        expected = " or ".join(repr(s) for s in supported)
        raise ConfigError(f"config.json: {key}={value!r} is not supported; this loader runs {key}={expected}")
    return value


def integer(config: Config, key: str, default: int | None = None, *, most: int = MOST) -> int:
    """`config[key]` as a positive integer of at most `most`."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise ConfigError(f"config.json: {key}={value!r:.80} must be a positive integer of at most {most}")
    return value


def number(config: Config, key: str, default: float) -> float:
    """`config[key]` as a positive number of at most `MOST`."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST:
        raise ConfigError(f"config.json: {key}={value!r:.80} must be a positive number of at most {MOST}")
    return float(value)


def flag(config: Config, key: str, default: bool) -> bool:
    """`config[key]` as true or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json: {key}={value!r} must be true or false")
    return value


def per_layer(
    config: Config, key: str, layers: int, default: Any, *, of: str = "num_hidden_layers"
) -> list[Any]:
    """`config[key]` for each layer: one value for all, or a list with one entry a layer. `of` says in errors what there
    are so many of."""
    value = config.get(key, default)
    if not isinstance(value, list):
        return [value] * layers
    if len(value) != layers:
        raise ConfigError(f"config.json: {key} has {len(value)} entries for {of}={layers}")
    return value


def token_ids(config: Config, key: str, default: Any) -> tuple[int, ...]:
    """`config[key]` as token ids: absent, one or several."""
    value = config.get(key, default)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= MOST for i in ids):
        raise ConfigError(
            f"config.json: {key}={value!r:.80} must be a token id or a list of token ids of at most {MOST}"
        )
    return tuple(ids)


def one_or_list(values: list[Any]) -> Any:
    """The single value when all layers agree, which is what stock loaders read, else the list."""
    return values[0] if len(set(values)) == 1 else values


def check_sizes(spec: ModelSpec) -> ModelSpec:
    """The spec. Raises ConfigError where it is larger than any real one: a config is from a stranger."""
    ffns = [layer.ffn for layer in spec.layers]
    mixers = [layer.mixer for layer in spec.layers if isinstance(layer.mixer, DeltaSpec | AttentionSpec)]
    for what, found, most in (
        ("rows of input projections", sum(sum(m.in_proj_sizes) for m in mixers), MOST_ROWS),
        ("experts", sum(f.num_experts for f in ffns if isinstance(f, MoESpec)), MOST_EXPERTS),
    ):
        if found > most:
            raise ConfigError(
                f"config.json: {len(spec.layers)} layers with {found} {what} in all; at most {most} are allowed"
            )
    widest = max(spec.vocab_size, *(sum(m.in_proj_sizes) for m in mixers), *map(_rows, ffns))
    if widest * spec.hidden_size > MOST_WEIGHTS:
        raise ConfigError(
            f"config.json: hidden_size={spec.hidden_size} and its other sizes give a matrix of {widest} rows; "
            f"at most {MOST_WEIGHTS} weights are allowed"
        )
    return spec


def _rows(ffn: MLPSpec | MoESpec) -> int:
    """Rows of the largest matrix of a feed-forward, all experts together."""
    if isinstance(ffn, MoESpec):
        return max(ffn.num_experts * 2 * ffn.expert_size, 2 * ffn.shared_size)
    return 2 * ffn.intermediate_size
