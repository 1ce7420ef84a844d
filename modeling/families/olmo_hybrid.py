"""OLMo-Hybrid: gated delta rule layers with softmax attention in between, as transformers 5.23 reads them."""

from collections.abc import Collection
from typing import Any

from modeling.families import hybrid
from modeling.families.base import (
    MOST_CONV,
    Config,
    Role,
    TensorMap,
    check_sizes,
    flag,
    integer,
    number,
    option,
    per_layer,
    refuse_quantised,
    token_ids,
)
from modeling.spec import AttentionSpec, DeltaSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec

_OUTPUT_EPS = 1e-5
"""Epsilon of linear attention's output norm, which no config says."""


class OlmoHybrid:
    """Linear layers have their norms in front, attention layers behind."""

    model_types = ("olmo_hybrid",)
    ignored = ("mtp.",)

    def spec(self, config: Config) -> ModelSpec:
        refuse_quantised(config)
        option(config, "hidden_act", "silu", ("silu",))
        option(config, "attention_bias", False, (False,))
        hidden_size, heads = integer(config, "hidden_size", 3840), integer(config, "num_attention_heads", 30)
        norm = NormSpec(number(config, "rms_norm_eps", 1e-6))
        mlp = MLPSpec(integer(config, "intermediate_size", 11008))
        linear = hybrid.linear_layers({"num_hidden_layers": 32, **config})
        deltas = iter(_deltas(config, hidden_size, heads, linear.count(True)))
        head_dim = integer(config, "head_dim", hidden_size // heads)
        attention = hybrid.attention(
            {"num_attention_heads": 30, **config},
            head_dim,
            rope=hybrid.rope(config, head_dim, None),
            qk_norm="whole",
            gated=False,
            eps=norm.eps,
        )
        layers = [
            LayerSpec(next(deltas), mlp, norm)
            if is_linear
            else LayerSpec(attention, mlp, norm, norm_after=True)
            for is_linear in linear
        ]
        return check_sizes(
            ModelSpec(
                family="olmo_hybrid",
                vocab_size=integer(config, "vocab_size", 100352),
                hidden_size=hidden_size,
                layers=tuple(layers),
                norm=norm,
                tie_embeddings=flag(config, "tie_word_embeddings", False),
                context_length=integer(config, "max_position_embeddings", 65536),
                eos_token_ids=token_ids(config, "eos_token_id", 100257),
            )
        )

    def tensors(self, spec: ModelSpec, names: Collection[str] = ()) -> list[TensorMap]:
        hidden = spec.hidden_size

        def one(layer: int | None, role: Role, ours: str, theirs: str, rows: int) -> TensorMap:
            return TensorMap(layer, role, ours, (f"{theirs}.weight",), (rows,))

        maps = [one(None, "embeddings", "embeddings.weight", "model.embed_tokens", spec.vocab_size)]
        for i, layer in enumerate(spec.layers):
            ours, theirs = f"layers.{i}.", f"model.layers.{i}."
            if isinstance(layer.mixer, DeltaSpec):
                # The release calls the norms as Llama does; transformers' own converter has names of its own.
                norms = ("input_layernorm", "post_attention_layernorm")
                if f"{theirs}attention_layer_norm.weight" in names:
                    norms = ("attention_layer_norm", "feedforward_layer_norm")
                maps += _delta_tensors(i, layer.mixer, f"{ours}mixer.", f"{theirs}linear_attn.", hidden)
            else:
                assert isinstance(layer.mixer, AttentionSpec)
                norms = ("post_attention_layernorm", "post_feedforward_layernorm")
                maps += _attention_tensors(i, layer.mixer, f"{ours}mixer.", f"{theirs}self_attn.", hidden)
            for our_norm, their_norm in zip(("mixer_norm", "ffn_norm"), norms, strict=True):
                maps.append(one(i, "norm", f"{ours}{our_norm}.weight", f"{theirs}{their_norm}", hidden))
            assert isinstance(layer.ffn, MLPSpec)
            maps += hybrid.mlp(i, f"{ours}ffn.", f"{theirs}mlp.", layer.ffn.intermediate_size, hidden)
        maps.append(one(None, "norm", "norm.weight", "model.norm", hidden))
        if not spec.tie_embeddings:
            maps.append(one(None, "head", "lm_head.weight", "lm_head", spec.vocab_size))
        return maps

    def config_with_d_k(self, config: Config, spec: ModelSpec) -> dict[str, Any]:
        return hybrid.key_widths(config, spec)


def _deltas(config: Config, hidden_size: int, heads: int, layers: int) -> list[DeltaSpec]:
    """The mixers of the linear layers; what the config leaves out follows from the rest, as in transformers."""
    known = {key: value for key, value in config.items() if value is not None}
    num_k_heads, num_v_heads = hybrid.linear_heads(known, heads, heads)
    default = int(0.75 * hidden_size / num_k_heads)
    said = per_layer(known, "linear_key_head_dim", layers, default, of="linear_attention layers")
    widths = [integer({"linear_key_head_dim": d_k}, "linear_key_head_dim") for d_k in said]
    return [
        DeltaSpec(
            num_k_heads=num_k_heads,
            num_v_heads=num_v_heads,
            d_k=d_k,
            d_v=integer(known, "linear_value_head_dim", 2 * widths[0]),
            conv_kernel=integer(known, "linear_conv_kernel_dim", 4, most=MOST_CONV),
            conv_bias=False,
            has_decay=True,
            has_beta=True,
            beta_scale=2.0 if flag(known, "linear_allow_neg_eigval", True) else 1.0,
            gate="silu",
            norm_eps=_OUTPUT_EPS,
        )
        for d_k in widths
    ]


def _delta_tensors(i: int, m: DeltaSpec, ours: str, theirs: str, hidden: int) -> list[TensorMap]:
    qkv = (m.key_dim, m.key_dim, m.value_dim)
    parts = dict(zip("qkvgba", (*qkv, m.value_dim, m.num_v_heads, m.num_v_heads), strict=True))
    return [
        TensorMap(
            i,
            "in_proj",
            f"{ours}in_proj.weight",
            tuple(f"{theirs}{name}_proj.weight" for name in parts),
            tuple(parts.values()),
        ),
        TensorMap(
            i, "filters", f"{ours}conv.weight", tuple(f"{theirs}{name}_conv1d.weight" for name in "qkv"), qkv
        ),
        TensorMap(i, "decay", f"{ours}A_log", (f"{theirs}A_log",), (m.num_v_heads,)),
        TensorMap(i, "decay", f"{ours}dt_bias", (f"{theirs}dt_bias",), (m.num_v_heads,)),
        TensorMap(i, "norm", f"{ours}o_norm.weight", (f"{theirs}o_norm.weight",), (m.d_v,)),
        TensorMap(i, "out_proj", f"{ours}o_proj.weight", (f"{theirs}o_proj.weight",), (hidden,)),
    ]


def _attention_tensors(i: int, m: AttentionSpec, ours: str, theirs: str, hidden: int) -> list[TensorMap]:
    return [
        TensorMap(
            i,
            "in_proj",
            f"{ours}in_proj.weight",
            tuple(f"{theirs}{name}_proj.weight" for name in "qkv"),
            (m.q_dim, m.kv_dim, m.kv_dim),
        ),
        TensorMap(i, "norm", f"{ours}q_norm.weight", (f"{theirs}q_norm.weight",), (m.q_dim,)),
        TensorMap(i, "norm", f"{ours}k_norm.weight", (f"{theirs}k_norm.weight",), (m.kv_dim,)),
        TensorMap(i, "out_proj", f"{ours}o_proj.weight", (f"{theirs}o_proj.weight",), (hidden,)),
    ]
