"""Qwen3.5, 3.6 and 3.8, dense and with experts, and Qwen3-Next: gated delta rule layers with softmax attention in
between, as transformers 5.23 reads them."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from modeling.families import hybrid
from modeling.families.base import (
    MOST_CONV,
    Config,
    ConfigError,
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
from modeling.spec import AttentionSpec, DeltaSpec, LayerSpec, MLPSpec, ModelSpec, MoESpec, NormSpec

_NESTED = ("qwen3_5", "qwen3_5_moe")
"""Checkpoints that see as well, whose language model's config is in `text_config`."""
_NEXT = "qwen3_next"
_MOST_EXPERTS = 1024


class Qwen:
    """One class for all of them: they differ in where the config lies, in how the input projections of linear layers
    are put together, and in their feed-forwards."""

    model_types = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text", _NEXT)
    ignored = ("mtp.", "model.visual.")

    def spec(self, config: Config) -> ModelSpec:
        model_type = config["model_type"]
        refuse_quantised(config)
        text = _text(config)
        refuse_quantised(text)
        option(text, "hidden_act", "silu", ("silu",))
        option(text, "attention_bias", False, (False,))
        option(text, "attn_output_gate", True, (True,))
        option(text, "output_gate_type", "swish", ("swish", "silu"))
        norm = NormSpec(number(text, "rms_norm_eps", 1e-6))
        linear = hybrid.linear_layers(text)
        deltas = iter(_deltas(text, linear.count(True), norm.eps))
        attention = _attention(text, norm.eps)
        layers = [
            LayerSpec(next(deltas) if is_linear else attention, ffn, norm)
            for is_linear, ffn in zip(linear, _feed_forwards(model_type, text, len(linear)), strict=True)
        ]
        tied = config if "tie_word_embeddings" in config else text
        ends = [*token_ids(text, "eos_token_id", None), *token_ids(config, "eos_token_id", None)]
        return check_sizes(
            ModelSpec(
                family=model_type,
                vocab_size=integer(text, "vocab_size"),
                hidden_size=integer(text, "hidden_size"),
                layers=tuple(layers),
                norm=norm,
                tie_embeddings=flag(tied, "tie_word_embeddings", False),
                context_length=integer(text, "max_position_embeddings", 32768),
                eos_token_ids=tuple(dict.fromkeys(ends)),
            )
        )

    def tensors(self, spec: ModelSpec, names: Collection[str] = ()) -> list[TensorMap]:
        nested = (
            spec.family in _NESTED if not names else any(n.startswith("model.language_model.") for n in names)
        )
        prefix = "model.language_model." if nested else "model."
        maps = [
            _one(None, "embeddings", "embeddings.weight", f"{prefix}embed_tokens.weight", spec.vocab_size)
        ]
        for i, layer in enumerate(spec.layers):
            ours, theirs = f"layers.{i}.", f"{prefix}layers.{i}."
            maps.append(
                _norm(i, f"{ours}mixer_norm.weight", f"{theirs}input_layernorm.weight", spec.hidden_size)
            )
            if isinstance(layer.mixer, DeltaSpec):
                maps += _delta_tensors(spec, i, layer.mixer, f"{ours}mixer.", f"{theirs}linear_attn.")
            elif isinstance(layer.mixer, AttentionSpec):
                maps += _attention_tensors(spec, i, layer.mixer, f"{ours}mixer.", f"{theirs}self_attn.")
            maps.append(
                _norm(
                    i, f"{ours}ffn_norm.weight", f"{theirs}post_attention_layernorm.weight", spec.hidden_size
                )
            )
            if isinstance(layer.ffn, MoESpec):
                maps += _moe_tensors(spec, i, layer.ffn, f"{ours}ffn.", f"{theirs}mlp.", names)
            else:
                size = layer.ffn.intermediate_size
                maps += hybrid.mlp(i, f"{ours}ffn.", f"{theirs}mlp.", size, spec.hidden_size)
        maps.append(_norm(None, "norm.weight", f"{prefix}norm.weight", spec.hidden_size))
        if not spec.tie_embeddings:
            maps.append(_one(None, "head", "lm_head.weight", "lm_head.weight", spec.vocab_size))
        return maps

    def config_with_d_k(self, config: Config, spec: ModelSpec) -> dict[str, Any]:
        if config["model_type"] in _NESTED:
            return {**config, "text_config": hybrid.key_widths(config["text_config"], spec)}
        return hybrid.key_widths(config, spec)


def _text(config: Config) -> Config:
    """The config of the language model."""
    if config["model_type"] not in _NESTED:
        return config
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise ConfigError(
            f"config.json: text_config={text!r:.80} must be an object, the language model's config, where "
            f"model_type={config['model_type']!r}"
        )
    option(text, "model_type", None, (None, f"{config['model_type']}_text"))
    return text


def _deltas(config: Config, layers: int, eps: float) -> list[DeltaSpec]:
    """The mixers of the linear layers."""
    num_k_heads, num_v_heads = hybrid.linear_heads(config, 16, 32)
    return [
        DeltaSpec(
            num_k_heads=num_k_heads,
            num_v_heads=num_v_heads,
            d_k=integer({"linear_key_head_dim": d_k}, "linear_key_head_dim"),
            d_v=integer(config, "linear_value_head_dim", 128),
            conv_kernel=integer(config, "linear_conv_kernel_dim", 4, most=MOST_CONV),
            conv_bias=False,
            has_decay=True,
            has_beta=True,
            beta_scale=1.0,
            gate="silu",
            norm_eps=eps,
        )
        for d_k in per_layer(config, "linear_key_head_dim", layers, 128, of="linear_attention layers")
    ]


def _attention(config: Config, eps: float) -> AttentionSpec:
    head_dim = integer(config, "head_dim", 256)
    rope = hybrid.rope(config, head_dim, 0.25)
    return hybrid.attention(config, head_dim, rope=rope, qk_norm="head", gated=True, eps=eps)


def _feed_forwards(model_type: str, config: Config, layers: int) -> list[MLPSpec | MoESpec]:
    """The feed-forward of each layer."""
    if model_type.startswith("qwen3_5") and "moe" not in model_type:
        return [MLPSpec(integer(config, "intermediate_size"))] * layers
    option(config, "norm_topk_prob", True, (True,))
    experts = integer(config, "num_experts", 512 if model_type == _NEXT else 256, most=_MOST_EXPERTS)
    top_k = integer(config, "num_experts_per_tok", 10 if model_type == _NEXT else 8)
    if top_k > experts:
        raise ConfigError(f"config.json: num_experts_per_tok={top_k} must be at most num_experts={experts}")
    moe = MoESpec(
        experts,
        top_k,
        integer(config, "moe_intermediate_size", 512),
        integer(config, "shared_expert_intermediate_size", 512),
    )
    if model_type != _NEXT:
        option(config, "mlp_only_layers", None, (None, []))
        return [moe] * layers
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise ConfigError(f"config.json: mlp_only_layers={dense!r:.80} must be a list of layers")
    step = integer(config, "decoder_sparse_step", 1)
    return [
        MLPSpec(integer(config, "intermediate_size", 5632)) if i in dense or (i + 1) % step else moe
        for i in range(layers)
    ]


def _one(layer: int | None, role: Role, ours: str, theirs: str, rows: int) -> TensorMap:
    """One of ours that is one of theirs."""
    return TensorMap(layer, role, ours, (theirs,), (rows,))


def _norm(layer: int | None, ours: str, theirs: str, size: int) -> TensorMap:
    """A norm that is stored as what its weight differs from 1 by, as all are but that of linear attention's output."""
    return TensorMap(layer, "norm", ours, (theirs,), (size,), offset=1.0)


def _delta_tensors(spec: ModelSpec, i: int, m: DeltaSpec, ours: str, theirs: str) -> list[TensorMap]:
    parts = dict(zip(("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), m.in_proj_sizes, strict=True))
    if spec.family == _NEXT:
        parts = {"in_proj_qkvz": m.conv_channels + m.value_dim, "in_proj_ba": 2 * m.num_v_heads}
    return [
        TensorMap(
            i,
            "in_proj",
            f"{ours}in_proj.weight",
            tuple(f"{theirs}{name}.weight" for name in parts),
            tuple(parts.values()),
            order=_interleaved(m) if spec.family == _NEXT else None,
        ),
        _one(i, "filters", f"{ours}conv.weight", f"{theirs}conv1d.weight", m.conv_channels),
        _one(i, "decay", f"{ours}A_log", f"{theirs}A_log", m.num_v_heads),
        _one(i, "decay", f"{ours}dt_bias", f"{theirs}dt_bias", m.num_v_heads),
        _one(i, "norm", f"{ours}o_norm.weight", f"{theirs}norm.weight", m.d_v),
        _one(i, "out_proj", f"{ours}o_proj.weight", f"{theirs}out_proj.weight", spec.hidden_size),
    ]


def _interleaved(m: DeltaSpec) -> Tensor:
    """Rows of Qwen3-Next's projections in the order `q | k | v | gate | beta | decay`, int64.

    They are stored key head by key head: its q, its k, then v and gate of its value heads; and in a second matrix beta
    and decay of its value heads.
    """
    groups = m.num_v_heads // m.num_k_heads
    sizes = [m.d_k, m.d_k, groups * m.d_v, groups * m.d_v]
    qkvz = torch.arange(m.conv_channels + m.value_dim).view(m.num_k_heads, sum(sizes))
    ba = torch.arange(2 * m.num_v_heads).view(m.num_k_heads, 2, groups) + qkvz.numel()
    return torch.cat([part.flatten() for part in (*qkvz.split(sizes, dim=1), *ba.unbind(1))])


def _attention_tensors(spec: ModelSpec, i: int, m: AttentionSpec, ours: str, theirs: str) -> list[TensorMap]:
    # The query projection holds each head's queries, then its gate.
    q_gate = torch.arange(2 * m.q_dim).view(m.num_heads, 2, m.head_dim)
    k_v = torch.arange(2 * m.kv_dim) + q_gate.numel()
    return [
        TensorMap(
            i,
            "in_proj",
            f"{ours}in_proj.weight",
            tuple(f"{theirs}{name}_proj.weight" for name in "qkv"),
            (2 * m.q_dim, m.kv_dim, m.kv_dim),
            order=torch.cat([q_gate[:, 0].flatten(), k_v, q_gate[:, 1].flatten()]),
        ),
        _norm(i, f"{ours}q_norm.weight", f"{theirs}q_norm.weight", m.head_dim),
        _norm(i, f"{ours}k_norm.weight", f"{theirs}k_norm.weight", m.head_dim),
        _one(i, "out_proj", f"{ours}o_proj.weight", f"{theirs}o_proj.weight", spec.hidden_size),
    ]


def _moe_tensors(
    spec: ModelSpec, i: int, m: MoESpec, ours: str, theirs: str, names: Collection[str]
) -> list[TensorMap]:
    hidden, size = spec.hidden_size, m.expert_size
    # Qwen's own Qwen3.5 checkpoints hold all experts of a layer in one tensor; Qwen3-Next's, and whatever transformers
    # saves, have tensors for each.
    fused = f"{theirs}experts.gate_up_proj" in names if names else spec.family != _NEXT
    if fused:
        experts = [
            _one(i, "experts", f"{ours}in_proj", f"{theirs}experts.gate_up_proj", m.num_experts),
            _one(i, "experts", f"{ours}out_proj", f"{theirs}experts.down_proj", m.num_experts),
        ]
    else:
        each = [f"{theirs}experts.{e}." for e in range(m.num_experts)]
        gate_up = tuple(f"{e}{name}_proj.weight" for e in each for name in ("gate", "up"))
        down = tuple(f"{e}down_proj.weight" for e in each)
        experts = [
            TensorMap(i, "experts", f"{ours}in_proj", gate_up, (size,) * len(gate_up), stacked=True),
            TensorMap(i, "experts", f"{ours}out_proj", down, (hidden,) * len(down), stacked=True),
        ]
    return [
        _one(i, "router", f"{ours}router.weight", f"{theirs}gate.weight", m.num_experts),
        *experts,
        *hybrid.mlp(i, f"{ours}shared.", f"{theirs}shared_expert.", m.shared_size, hidden),
        _one(i, "router", f"{ours}shared_gate.weight", f"{theirs}shared_expert_gate.weight", 1),
    ]
