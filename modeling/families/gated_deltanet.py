"""`gated_deltanet` checkpoints of flash-linear-attention (arXiv 2412.06464)."""

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
from modeling.spec import DeltaSpec, GateActivation, ModelSpec

_GATES: dict[str, GateActivation] = {"swish": "silu", "silu": "silu", "sigmoid": "sigmoid"}


def expand_v_for(d_k: int, d_v: int) -> float:
    """The `expand_v` from which fla's `int(head_dim * expand_v)` gives d_v back.

    d_v / d_k alone truncates to d_v - 1 for some widths (d_v 128: 49, 98, 103, 107).
    """
    value = d_v / d_k
    return value if int(d_k * value) == d_v else math.nextafter(value, math.inf)


class GatedDeltaNet:
    """fla sets d_k = head_dim and d_v = int(head_dim * expand_v), so both change with d_k."""

    model_types = ("gated_deltanet",)
    ignored = ()

    def spec(self, config: Config) -> ModelSpec:
        fla.refuse_unsupported(config)
        layers = integer(config, "num_hidden_layers", 21, most=MOST_LAYERS)
        num_k_heads = integer(config, "num_heads", 6)
        num_v_heads = num_k_heads if config.get("num_v_heads") is None else integer(config, "num_v_heads")
        if num_v_heads % num_k_heads:
            raise ConfigError(
                f"config.json: num_v_heads={num_v_heads} must be a multiple of num_heads={num_k_heads}"
            )
        gate: GateActivation = "none"
        if flag(config, "use_gate", True):
            gate = _GATES[option(config, "output_gate_activation", "swish", tuple(_GATES))]
        mixers = []
        head_dims = per_layer(config, "head_dim", layers, 256)
        expands = per_layer(config, "expand_v", layers, 2.0)
        for head_dim, expand_v in zip(head_dims, expands, strict=True):
            d_k = integer({"head_dim": head_dim}, "head_dim")
            product = d_k * number({"expand_v": expand_v}, "expand_v", 2.0)
            if not math.isclose(product, int(product), rel_tol=1e-5):
                raise ConfigError(
                    f"config.json: expand_v={expand_v!r} with head_dim={d_k} gives d_v={product}, "
                    "which must be an integer"
                )
            mixers.append(
                DeltaSpec(
                    num_k_heads=num_k_heads,
                    num_v_heads=num_v_heads,
                    d_k=d_k,
                    d_v=int(product),
                    conv_kernel=integer(config, "conv_size", 4, most=MOST_CONV),
                    conv_bias=flag(config, "conv_bias", False),
                    has_decay=True,
                    has_beta=True,
                    beta_scale=2.0 if flag(config, "allow_neg_eigval", False) else 1.0,
                    gate=gate,
                    norm_eps=number(config, "norm_eps", 1e-6),
                )
            )
        return fla.model_spec("gated_deltanet", config, mixers)

    def tensors(self, spec: ModelSpec, names: Collection[str] = ()) -> list[TensorMap]:
        return fla.tensors(spec)

    def config_with_d_k(self, config: Config, spec: ModelSpec) -> dict[str, Any]:
        mixers = spec.deltas.values()
        head_dim = one_or_list([m.d_k for m in mixers])
        expand_v = one_or_list([expand_v_for(m.d_k, m.d_v) for m in mixers])
        return {**config, "head_dim": head_dim, "expand_v": expand_v}
