"""What the hybrids share: layers of two kinds, rotary embeddings, feed-forward names (transformers 5.23)."""

from collections.abc import Mapping
from typing import Any

from modeling.families.base import (
    MOST_LAYERS,
    Config,
    ConfigError,
    TensorMap,
    integer,
    number,
    one_or_list,
    option,
)
from modeling.spec import AttentionSpec, ModelSpec, QkNorm, RopeSpec

_KINDS = ("linear_attention", "full_attention")


def linear_layers(config: Config) -> list[bool]:
    """Whether each layer's mixer is linear attention; else it is softmax attention.

    Either `layer_types` says so layer by layer, or every `full_attention_interval`-th is softmax attention.
    """
    layers = integer(config, "num_hidden_layers", most=MOST_LAYERS)
    types = config.get("layer_types")
    if types is None:
        interval = integer(config, "full_attention_interval", 4)
        types = [_KINDS[(i + 1) % interval == 0] for i in range(layers)]
    if not isinstance(types, list) or len(types) != layers or any(kind not in _KINDS for kind in types):
        raise ConfigError(
            f"config.json: layer_types={types!r:.80} must name {_KINDS[0]} or {_KINDS[1]} for each of the "
            f"num_hidden_layers={layers}"
        )
    linear = [kind == _KINDS[0] for kind in types]
    if not any(linear):
        raise ConfigError(f"config.json: layer_types names no {_KINDS[0]}: there is no state to reduce")
    return linear


def linear_heads(config: Config, key_heads: int, value_heads: int) -> tuple[int, int]:
    """Key and value heads of the linear layers; as many as given where the config says nothing."""
    num_k_heads = integer(config, "linear_num_key_heads", key_heads)
    num_v_heads = integer(config, "linear_num_value_heads", value_heads)
    if num_v_heads % num_k_heads:
        raise ConfigError(
            f"config.json: linear_num_value_heads={num_v_heads} must be a multiple of "
            f"linear_num_key_heads={num_k_heads}"
        )
    return num_k_heads, num_v_heads


def rope(config: Config, head_dim: int, share: float | None) -> RopeSpec | None:
    """The rotary embeddings; None where `rope_theta` is null in `rope_parameters`, which means that there are none.

    Args:
        share: What `partial_rotary_factor` is where the config says nothing; None for a family that rotates all
            channels whatever it says.
    """
    parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ConfigError(f"config.json: rope_parameters={parameters!r:.80} must be an object")
    # Older configs have what belongs there beside it.
    outside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    merged = {**outside, **parameters}
    option({"rope_type": merged.get("rope_type", merged.get("type"))}, "rope_type", None, (None, "default"))
    if "rope_theta" in merged and merged["rope_theta"] is None:
        return None
    factor = 1.0 if share is None else number(merged, "partial_rotary_factor", share)
    dims = int(head_dim * factor)
    if not 2 <= dims <= head_dim or dims % 2:
        raise ConfigError(
            f"config.json: partial_rotary_factor={factor} with head_dim={head_dim} rotates {dims} channels, which must "
            f"be an even number from 2 to {head_dim}"
        )
    return RopeSpec(dims, number(merged, "rope_theta", 10_000.0))


def attention(
    config: Config, head_dim: int, *, rope: RopeSpec | None, qk_norm: QkNorm, gated: bool, eps: float
) -> AttentionSpec:
    """The mixer of the softmax attention layers."""
    heads = integer(config, "num_attention_heads")
    unsaid = config.get("num_key_value_heads") is None
    kv_heads = heads if unsaid else integer(config, "num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(
            f"config.json: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}"
        )
    return AttentionSpec(heads, kv_heads, head_dim, rope, qk_norm, gated, eps)


def mlp(layer: int, ours: str, theirs: str, size: int, hidden: int) -> list[TensorMap]:
    """The tensors of a dense feed-forward, named alike in every family. `ours` and `theirs` end with a dot."""
    return [
        TensorMap(
            layer,
            "ffn",
            f"{ours}in_proj.weight",
            (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight"),
            (size, size),
        ),
        TensorMap(layer, "ffn", f"{ours}out_proj.weight", (f"{theirs}down_proj.weight",), (hidden,)),
    ]


def key_widths(config: Config, spec: ModelSpec) -> dict[str, Any]:
    """The part of a config that says d_k and d_v, for the linear layers of `spec`. d_v is said as well, because some
    configs derive it from d_k where it is not."""
    mixers = spec.deltas.values()
    return {
        **config,
        "linear_key_head_dim": one_or_list([m.d_k for m in mixers]),
        "linear_value_head_dim": next(iter(mixers)).d_v,
    }
