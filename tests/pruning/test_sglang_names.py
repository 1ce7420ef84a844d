"""Reduced checkpoints against what SGLang reads: every parameter of its models is filled, by tensors of its shape.

The tables are from SGLang 0.5.23 (models/qwen3_5.py, models/qwen3_next.py, models/qwen2_moe.py,
configs/qwen3_next.py), on one GPU and without its fusing of shared experts. SGLang itself was not run.
"""

import re

import pytest
from hybrid_cases import CASES
from hybrids import write_hybrid
from reducing import random_keep, reduce
from safetensors import safe_open

from modeling.checkpoint import open_checkpoint

REDUCED = {
    "vl-dense-tied": 8,
    "text-dense-tied": 5,
    "vl-moe-fused": 8,
    "vl-moe-each": 7,
    "text-moe-each-tied": 8,
    "resaved-moe-each": 4,
    "next": 8,
}
STACKED = [
    # Part of a parameter's name, of a tensor's name, and which part of the parameter the tensor is (load_weights)
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
    ("in_proj_qkvz.", "in_proj_qkv.", (0, 1, 2)),
    ("in_proj_qkvz.", "in_proj_z.", 3),
    ("in_proj_ba.", "in_proj_b.", 0),
    ("in_proj_ba.", "in_proj_a.", 1),
]
WHOLE = "whole"


def parameters(config, fused):
    """Parameters by name: the shape of each of their parts.

    Args:
        fused: whether the experts of a layer are two tensors.
    """
    text = config.get("text_config", config)
    hidden, vocabulary = text["hidden_size"], text["vocab_size"]
    found = {
        "model.embed_tokens.weight": {WHOLE: (vocabulary, hidden)},
        "model.norm.weight": {WHOLE: (hidden,)},
    }
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = {WHOLE: (vocabulary, hidden)}
    for i in range(text["num_hidden_layers"]):
        full = (i + 1) % text["full_attention_interval"] == 0
        layer = full_attention(text) if full else linear_attention(text)
        layer |= (
            experts(text, fused) if "num_experts" in text else mlp("mlp", text["intermediate_size"], hidden)
        )
        layer |= {f"{n}_layernorm.weight": {WHOLE: (hidden,)} for n in ("input", "post_attention")}
        found |= {f"model.layers.{i}.{name}": parts for name, parts in layer.items()}
    return found


def linear_attention(text):
    keys = text["linear_key_head_dim"] * text["linear_num_key_heads"]
    heads, d_v, hidden = text["linear_num_value_heads"], text["linear_value_head_dim"], text["hidden_size"]
    values = heads * d_v
    if text["model_type"] == "qwen3_next":  # it has the parameters' own form
        in_proj = {
            "linear_attn.in_proj_qkvz.weight": {WHOLE: (2 * keys + 2 * values, hidden)},
            "linear_attn.in_proj_ba.weight": {WHOLE: (2 * heads, hidden)},
        }
    else:
        in_proj = {
            "linear_attn.in_proj_qkvz.weight": {(0, 1, 2): (2 * keys + values, hidden), 3: (values, hidden)},
            "linear_attn.in_proj_ba.weight": {0: (heads, hidden), 1: (heads, hidden)},
        }
    return in_proj | {
        "linear_attn.conv1d.weight": {WHOLE: (2 * keys + values, 1, text["linear_conv_kernel_dim"])},
        "linear_attn.A_log": {WHOLE: (heads,)},
        "linear_attn.dt_bias": {WHOLE: (heads,)},
        "linear_attn.norm.weight": {WHOLE: (d_v,)},
        "linear_attn.out_proj.weight": {WHOLE: (hidden, values)},
    }


def full_attention(text):
    """Parameters of the module itself: the loader leaves `.self_attn` out of names."""
    hidden, width = text["hidden_size"], text["head_dim"]
    heads, kv = text["num_attention_heads"], text["num_key_value_heads"] * width
    return {
        "qkv_proj.weight": {"q": (heads * 2 * width, hidden), "k": (kv, hidden), "v": (kv, hidden)},
        "o_proj.weight": {WHOLE: (hidden, heads * width)},
        "q_norm.weight": {WHOLE: (width,)},
        "k_norm.weight": {WHOLE: (width,)},
    }


def mlp(name, size, hidden):
    return {
        f"{name}.gate_up_proj.weight": {0: (size, hidden), 1: (size, hidden)},
        f"{name}.down_proj.weight": {WHOLE: (hidden, size)},
    }


def experts(text, fused):
    count, size, hidden = text["num_experts"], text["moe_intermediate_size"], text["hidden_size"]
    if fused:
        w13, w2 = {"w1": (count, 2 * size, hidden)}, {"w2": (count, hidden, size)}
    else:
        w13 = {(shard, e): (size, hidden) for e in range(count) for shard in ("w1", "w3")}
        w2 = {("w2", e): (hidden, size) for e in range(count)}
    return {
        "mlp.experts.w13_weight": w13,
        "mlp.experts.w2_weight": w2,
        "mlp.gate.weight": {WHOLE: (count, hidden)},
        "mlp.shared_expert_gate.weight": {WHOLE: (1, hidden)},
    } | mlp("mlp.shared_expert", text["shared_expert_intermediate_size"], hidden)


def parameter_of(name, known):
    """The parameter that a tensor is loaded into, and which part of it, as `load_weights` finds them."""
    name = name.replace("model.language_model.", "model.").replace(".self_attn", "")
    if "mlp.experts" not in name:
        for ours, theirs, shard in STACKED:
            if theirs in name and name.replace(theirs, ours) in known:
                return name.replace(theirs, ours), shard
        return name, WHOLE
    for ending, ours, shard in (("gate_up_proj", "w13_weight", "w1"), ("down_proj", "w2_weight", "w2")):
        if name.endswith(f"experts.{ending}"):
            return name.replace(ending, ours), shard
    expert = re.fullmatch(r"(.*experts\.)(\d+)\.(gate|down|up)_proj\.weight", name)
    shard = {"gate": "w1", "down": "w2", "up": "w3"}[expert[3]]
    return f"{expert[1]}{'w2' if shard == 'w2' else 'w13'}_weight", (shard, int(expert[2]))


@pytest.mark.parametrize("name", REDUCED)
def test_every_parameter_is_filled_by_tensors_of_its_shape(tmp_path, name):
    checkpoint = open_checkpoint(write_hybrid(tmp_path / "dense", CASES[name]))
    n = REDUCED[name]
    reduce(checkpoint, random_keep(checkpoint.spec, (n,) * len(checkpoint.spec.d_k)), tmp_path / "reduced")
    config = open_checkpoint(tmp_path / "reduced").config
    assert config.get("text_config", config)["linear_key_head_dim"] == n
    known = parameters(config, CASES[name].fused)
    filled = {}
    with safe_open(tmp_path / "reduced/model.safetensors", framework="pt") as f:
        for tensor in f.keys():  # noqa: SIM118
            if "mtp" not in tensor and "visual" not in tensor:
                parameter, part = parameter_of(tensor, known)
                filled.setdefault(parameter, {})[part] = tuple(f.get_slice(tensor).get_shape())
    assert filled == known
