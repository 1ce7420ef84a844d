"""`delta_net` checkpoints of flash-linear-attention (arXiv 2406.06484)."""

import math
from collections.abc import Collection
from typing import Any

from modeling.families import fla
from modeling.families.base import (
    MOST_CONV,
    MOST_LAYERS,
    Config,
    ConfigError,
    TensorMap,
    flag,
    integer,
    number,
    one_or_list,
    option,
    per_layer,
)
from modeling.spec import DeltaSpec, ModelSpec


def _head_width(key: str, expand: Any, hidden_size: int, num_heads: int) -> int:
    """fla's `round(hidden_size * expand) / num_heads`."""
    width = hidden_size * number({key: expand}, key, 1.0)
    if not math.isclose(width, round(width)) or round(width) % num_heads:
        raise ConfigError(
            f"config.json: {key}={expand!r} with hidden_size={hidden_size} gives a width of {width}, "
            f"which must be a multiple of num_heads={num_heads}"
        )
    return round(width) // num_heads


class DeltaNet:
    """No decay; d_k and d_v come from expand_k and expand_v as shares of the hidden size."""

    model_types = ("delta_net",)
    ignored = ()

    def spec(self, config: Config) -> ModelSpec:
        fla.refuse_unsupported(config)
        option(config, "qk_norm", "l2", ("l2",))
        option(config, "qk_activation", "silu", ("silu",))
        option(config, "use_output_norm", True, (True,))
        layers = integer(config, "num_hidden_layers", 24, most=MOST_LAYERS)
        num_heads = integer(config, "num_heads", 16)
        hidden_size = integer(config, "hidden_size", 2048)
        d_v = _head_width("expand_v", config.get("expand_v", 1.0), hidden_size, num_heads)
        mixers = [
            DeltaSpec(
                num_k_heads=num_heads,
                num_v_heads=num_heads,
                d_k=_head_width("expand_k", expand_k, hidden_size, num_heads),
                d_v=d_v,
                conv_kernel=integer(config, "conv_size", 4, most=MOST_CONV),
                conv_bias=flag(config, "conv_bias", False),
                has_decay=False,
                has_beta=flag(config, "use_beta", True),
                beta_scale=2.0 if flag(config, "allow_neg_eigval", False) else 1.0,
                gate="silu" if flag(config, "use_gate", False) else "none",
                norm_eps=number(config, "norm_eps", 1e-6),
            )
            for expand_k in per_layer(config, "expand_k", layers, 1.0)
        ]
        return fla.model_spec("delta_net", config, mixers)

    def tensors(self, spec: ModelSpec, names: Collection[str] = ()) -> list[TensorMap]:
        return fla.tensors(spec)

    def config_with_d_k(self, config: Config, spec: ModelSpec) -> dict[str, Any]:
        expand_k = [m.key_dim / spec.hidden_size for m in spec.deltas.values()]
        return {**config, "expand_k": one_or_list(expand_k)}
