"""What the flash-linear-attention checkpoints share: tensor names, key rows, MLP sizes (fla 0.6)."""

from modeling.families.base import (
    Config,
    Role,
    TensorMap,
    check_sizes,
    flag,
    integer,
    number,
    option,
    refuse_quantised,
    token_ids,
)
from modeling.spec import DeltaSpec, LayerSpec, MLPSpec, ModelSpec, NormSpec


def refuse_unsupported(config: Config) -> None:
    """Options of every fla model that change the computation and that we don't run."""
    option(config, "attn", None, (None, {}))
    option(config, "use_short_conv", True, (True,))
    option(config, "hidden_act", "swish", ("swish", "silu"))
    option(config, "attnres_block_size", None, (None,))
    refuse_quantised(config)


def intermediate_size(config: Config, hidden_size: int) -> int:
    """fla's rule: 2/3 of `hidden_ratio * hidden_size`, rounded up to a multiple of 256, unless given."""
    if config.get("intermediate_size") is not None:
        return integer(config, "intermediate_size")
    ratio = 4 if config.get("hidden_ratio") is None else number(config, "hidden_ratio", 4)
    return 256 * -(-int(hidden_size * ratio * 2 / 3) // 256)


def model_spec(family: str, config: Config, mixers: list[DeltaSpec]) -> ModelSpec:
    """The parts of the spec that are alike in all fla models."""
    hidden_size, vocab_size = integer(config, "hidden_size", 2048), integer(config, "vocab_size", 32000)
    eps = number(config, "norm_eps", 1e-6)
    mlp = MLPSpec(intermediate_size(config, hidden_size))
    norm = NormSpec(eps)
    spec = ModelSpec(
        family=family,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        layers=tuple(LayerSpec(mixer, mlp, norm) for mixer in mixers),
        norm=norm,
        tie_embeddings=flag(config, "tie_word_embeddings", False),
        context_length=integer(config, "max_position_embeddings", 2048),
        eos_token_ids=token_ids(config, "eos_token_id", 2),
    )
    return check_sizes(spec)


def tensors(spec: ModelSpec) -> list[TensorMap]:
    """Every tensor of our model, made of fla's."""

    def same(layer: int | None, role: Role, ours: str, theirs: str, rows: int) -> TensorMap:
        return TensorMap(layer, role, ours, (theirs,), (rows,))

    hidden = spec.hidden_size
    maps = [same(None, "embeddings", "embeddings.weight", "model.embeddings.weight", spec.vocab_size)]
    for i, m in spec.deltas.items():
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        qkv = (m.key_dim, m.key_dim, m.value_dim)
        _, gate, beta, decay = m.in_proj_sizes
        parts = list(zip(("q", "k", "v"), qkv, strict=True))
        parts += [(name, rows) for name, rows in (("g", gate), ("b", beta), ("a", decay)) if rows]
        maps += [
            same(i, "norm", f"{ours}mixer_norm.weight", f"{theirs}attn_norm.weight", hidden),
            TensorMap(
                i,
                "in_proj",
                f"{ours}mixer.in_proj.weight",
                tuple(f"{theirs}attn.{name}_proj.weight" for name, _ in parts),
                tuple(rows for _, rows in parts),
            ),
        ]
        filters: list[tuple[Role, str]] = [("filters", "weight")]
        if m.conv_bias:
            filters.append(("filter_bias", "bias"))
        for role, kind in filters:
            names = tuple(f"{theirs}attn.{name}_conv1d.{kind}" for name in "qkv")
            maps.append(TensorMap(i, role, f"{ours}mixer.conv.{kind}", names, qkv))
        if m.has_decay:
            maps += [
                same(i, "decay", f"{ours}mixer.{name}", f"{theirs}attn.{name}", m.num_v_heads)
                for name in ("A_log", "dt_bias")
            ]
        maps += [
            same(i, "norm", f"{ours}mixer.o_norm.weight", f"{theirs}attn.o_norm.weight", m.d_v),
            same(i, "out_proj", f"{ours}mixer.o_proj.weight", f"{theirs}attn.o_proj.weight", hidden),
            same(i, "norm", f"{ours}ffn_norm.weight", f"{theirs}mlp_norm.weight", hidden),
            TensorMap(
                i,
                "ffn",
                f"{ours}ffn.in_proj.weight",
                (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"),
                (spec.layers[i].ffn.active_size,) * 2,
            ),
            same(i, "ffn", f"{ours}ffn.out_proj.weight", f"{theirs}mlp.down_proj.weight", hidden),
        ]
    maps.append(same(None, "norm", "norm.weight", "model.norm.weight", hidden))
    if not spec.tie_embeddings:
        maps.append(same(None, "head", "lm_head.weight", "lm_head.weight", spec.vocab_size))
    return maps
