"""What a checkpoint family says about itself, and how the two naming schemes are joined."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from modeling.spec import ModelSpec

Config = Mapping[str, Any]

MOST = 2**31 - 1
"""No number of any config is larger; a config is from a stranger, and what it says is built."""


class ConfigError(ValueError):
    """A config.json that we can't run; the message names the key, its value and what would be right."""


Role = Literal["embeddings", "in_proj", "filters", "filter_bias", "decay", "out_proj", "ffn", "norm", "head"]
"""What a tensor is for: `in_proj` and `out_proj` are a mixer's projections, `filters` and `filter_bias` its short
convolution's, `decay` what its decay is made of, `norm` the weight of any norm, `ffn` a matrix of a feed-forward."""


@dataclass(frozen=True)
class TensorMap:
    """How one of our tensors is made of a checkpoint's: they are concatenated along the first axis.

    What else may lie between the two (an order of rows, an offset, a reshape) belongs into these three methods: nothing
    else knows how the checkpoint's tensors lie.
    """

    layer: int | None
    """Index of the layer that it belongs to; None for what belongs to none."""
    role: Role
    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    """The rows of our tensor that each of theirs makes up."""

    def stored_shapes(self, shape: torch.Size) -> dict[str, list[tuple[int, ...]]]:
        """The shapes that each of theirs may have, by name, for our tensor of `shape`."""
        shapes: dict[str, list[tuple[int, ...]]] = {}
        for name, n in zip(self.theirs, self.rows, strict=True):
            shapes[name] = [(n, *shape[1:])]
            if self.role == "filters":
                # A depthwise convolution's; some checkpoints have an axis for its one input channel.
                shapes[name].append((n, 1, *shape[1:]))
        return shapes

    def join(self, parts: Sequence[Tensor], shape: torch.Size) -> Tensor:
        """Makes our tensor, of `shape`, of theirs."""
        return torch.cat([part.reshape(n, *shape[1:]) for part, n in zip(parts, self.rows, strict=True)])

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Makes theirs of our tensor."""
        parts = tensor.split(list(self.rows))
        return [part[:, None, :] if self.role == "filters" else part for part in parts]


class Family(Protocol):
    """One kind of public checkpoint (`model_type` of its config.json)."""

    @property
    def model_type(self) -> str: ...

    def spec(self, config: Config) -> ModelSpec:
        """Shapes of the checkpoint. Raises ConfigError for an option that we don't run."""
        ...

    def tensors(self, spec: ModelSpec) -> list[TensorMap]:
        """Every tensor of our model, and the tensors of the checkpoint that it is made of."""
        ...

    def key_rows(self, spec: ModelSpec) -> dict[str, Tensor]:
        """Where the key axis is: tensor name of the checkpoint -> row index of (set, head, channel),
        `[sets, num_k_heads, d_k]`. Rows in none of the sets are not keys."""
        ...

    def config_with_d_k(self, config: Config, spec: ModelSpec) -> dict[str, Any]:
        """The checkpoint's config for the shapes in `spec`, which differ from it in d_k only. One d_k for the whole
        model gives a config that the stock loaders read; a d_k per layer is written as a list, which they refuse."""
        ...


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


def per_layer(config: Config, key: str, layers: int, default: Any) -> list[Any]:
    """`config[key]` for each layer: one value for all, or a list with one entry a layer."""
    value = config.get(key, default)
    if not isinstance(value, list):
        return [value] * layers
    if len(value) != layers:
        raise ConfigError(f"config.json: {key} has {len(value)} entries for num_hidden_layers={layers}")
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
