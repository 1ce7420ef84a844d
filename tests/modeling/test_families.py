"""config.json -> ModelSpec and back: public shapes, refusals, rounding, and where the key axis is.

That names and shapes are those of fla's own models is in test_stock_fla.py.
"""

import json
import math

import pytest
import torch
from checkpoints import DELTA, GATED, random_tensors

from modeling.families import FAMILIES, ConfigError, family_of, key_rows
from modeling.families.gated_deltanet import expand_v_for
from modeling.spec import StateTypes

# The keys that matter of the public 1.3B DeltaNet, fla-hub/delta_net-1.3B-100B.
DELTA_NET_1_3B = {
    "model_type": "delta_net",
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_heads": 16,
    "expand_k": 1,
    "expand_v": 1,
    "conv_size": 4,
    "use_gate": False,
    "use_short_conv": True,
    "use_beta": True,
    "use_output_norm": True,
    "qk_norm": "l2",
    "qk_activation": "silu",
    "hidden_ratio": 4,
    "intermediate_size": None,
    "norm_eps": 1e-6,
    "attn": None,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "eos_token_id": 2,
}


def spec_of(config):
    return family_of(config).spec(config)


def test_delta_net_1_3b():
    spec = spec_of(DELTA_NET_1_3B)
    mixer = spec.layers[0].mixer
    assert (mixer.num_k_heads, mixer.num_v_heads, mixer.d_k, mixer.d_v) == (16, 16, 128, 128)
    assert (mixer.gate, mixer.has_decay, mixer.has_beta, mixer.beta_scale) == ("none", False, True, 1.0)
    assert spec.layers[0].ffn.intermediate_size == 5632
    assert (spec.context_length, spec.eos_token_ids, spec.vocab_size) == (2048, (2,), 32000)
    recurrent, conv = 24 * 16 * 128 * 128 * 4, 24 * 3 * 2048 * 3
    assert spec.state_bytes(0) == recurrent + conv * 4 == 26_935_296
    assert spec.state_bytes(0, StateTypes(inputs=torch.bfloat16)) == recurrent + conv * 2
    half = spec.with_d_k((64,) * 24)
    assert half.state_bytes(0) == recurrent // 2 + 24 * (2 * 1024 + 2048) * 3 * 4
    assert half.mean_d_k == 64


def test_gated_deltanet_class_defaults():
    spec = spec_of({"model_type": "gated_deltanet"})
    mixer = spec.layers[0].mixer
    assert len(spec.layers) == 21
    assert (mixer.num_k_heads, mixer.num_v_heads, mixer.d_k, mixer.d_v) == (6, 6, 256, 512)
    assert (mixer.gate, mixer.has_decay, mixer.has_beta, mixer.conv_kernel) == ("silu", True, True, 4)
    assert spec.hidden_size == 2048 and spec.layers[0].ffn.intermediate_size == 5632
    assert not spec.tie_embeddings


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"hidden_size": 1024}, 2816),  # 2730.67 -> 256 * 11
        ({"hidden_size": 768}, 2048),  # exact
        ({"hidden_size": 1024, "hidden_ratio": 3}, 2048),
        ({"hidden_size": 1024, "hidden_ratio": None}, 2816),
        ({"hidden_size": 1024, "intermediate_size": 1000, "hidden_ratio": 8}, 1000),
    ],
)
def test_intermediate_size_rule(given, expected):
    config = {"model_type": "gated_deltanet", **given}
    assert spec_of(config).layers[0].ffn.intermediate_size == expected


BAD = [
    (GATED, "attn", {"layers": [1], "num_heads": 2}),
    (GATED, "use_short_conv", False),
    (GATED, "hidden_act", "gelu"),
    (GATED, "attnres_block_size", 4),
    (GATED, "quantization_config", {"quant_method": "fp8"}),
    (GATED, "output_gate_activation", "relu"),
    (GATED, "head_dim", 0),
    (GATED, "head_dim", "32"),
    (GATED, "head_dim", 32.0),
    (GATED, "head_dim", None),
    (GATED, "expand_v", 0.7),
    (GATED, "expand_v", float("nan")),
    (GATED, "expand_v", float("inf")),
    (GATED, "expand_v", "2"),
    (GATED, "num_v_heads", 3),
    (GATED, "num_v_heads", -2),
    (GATED, "num_heads", True),
    (GATED, "use_gate", "false"),
    (GATED, "allow_neg_eigval", 1),
    (GATED, "norm_eps", 0),
    (GATED, "norm_eps", float("nan")),
    (GATED, "vocab_size", -1),
    (GATED, "eos_token_id", "</s>"),
    (GATED, "eos_token_id", [1, None]),
    (GATED, "eos_token_id", -1),
    (GATED, "tie_word_embeddings", None),
    (DELTA, "attn", {"layers": [0], "num_heads": 2}),
    (DELTA, "use_short_conv", False),
    (DELTA, "hidden_act", "relu"),
    (DELTA, "attnres_block_size", 4),
    (DELTA, "quantization_config", {"bits": 4}),
    (DELTA, "qk_norm", "sum"),
    (DELTA, "qk_activation", "elu"),
    (DELTA, "use_output_norm", False),
    (DELTA, "expand_k", 0.3),
    (DELTA, "expand_k", float("nan")),
    (DELTA, "expand_k", float("inf")),
    (DELTA, "expand_v", [1.0, 1.0, 1.0]),
    (DELTA, "num_heads", 3),
    (DELTA, "hidden_size", "64"),
    (DELTA, "num_hidden_layers", 2.5),
    (DELTA, "conv_size", 0),
    (DELTA, "use_beta", "yes"),
    (DELTA, "max_position_embeddings", None),
]


@pytest.mark.parametrize(("base", "key", "value"), BAD, ids=lambda p: None if isinstance(p, dict) else str(p))
def test_an_option_that_we_do_not_run_is_refused_by_name_and_value(base, key, value):
    spec_of(base)
    with pytest.raises(ConfigError) as e:
        spec_of({**base, key: value})
    message = str(e.value)
    shown = repr(value[1]) if key == "expand_v" and isinstance(value, list) else repr(value)
    assert key in message and shown in message
    # ... and says where, and what would be right
    assert message.startswith("config.json: ") and ("must" in message or "runs" in message)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", 2**30),
        ("hidden_size", 10**400),
        ("head_dim", 2**40),
        ("conv_size", 2**20),
        ("vocab_size", 2**62),
        ("num_v_heads", 2**30),
        ("expand_v", 2.0**30),
        ("norm_eps", 10**400),
        ("hidden_ratio", 1e300),
        ("eos_token_id", 10**30),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(key, value):
    with pytest.raises(ConfigError) as e:
        spec_of({**GATED, "intermediate_size": None, key: value})
    message = str(e.value)
    assert message.startswith("config.json: ") and "most" in message and len(message) < 300
    assert key in message or "matrix" in message or "rows of input projections" in message


@pytest.mark.parametrize("key", ["head_dim", "expand_v"])
def test_a_list_must_have_one_entry_a_layer(key):
    with pytest.raises(ConfigError, match=f"{key} has 2 entries for num_hidden_layers=3"):
        spec_of({**GATED, key: [32, 32]})


@pytest.mark.parametrize("model_type", ["llama", None, ["delta_net"], 3])
def test_unknown_model_type(model_type):
    with pytest.raises(ConfigError, match=r"model_type=.* known families: delta_net, gated_deltanet") as e:
        family_of({"model_type": model_type})
    assert repr(model_type) in str(e.value)
    with pytest.raises(ConfigError, match="model_type=None"):
        family_of({})


def test_each_family_is_registered_under_its_own_model_type():
    assert all(name in family.model_types for name, family in FAMILIES.items())


@pytest.mark.parametrize("d_v", [128, 512])
def test_every_d_k_keeps_d_v_through_the_config(d_v):
    base = {**GATED, "head_dim": d_v, "expand_v": 1.0}
    family = family_of(base)
    spec = family.spec(base)
    truncated = []
    for n in range(1, 513):
        reduced = spec.with_d_k((n,) * 3)
        # through JSON, as a checkpoint goes
        config = json.loads(json.dumps(family.config_with_d_k(base, reduced)))
        assert family.spec(config) == reduced
        # fla's own rule
        head_v_dim = int(config["head_dim"] * config["expand_v"])
        assert head_v_dim == d_v
        assert math.isclose(config["head_dim"] * config["expand_v"], head_v_dim, rel_tol=1e-5)
        if int(n * (d_v / n)) != d_v:
            truncated.append(n)
    if d_v == 128:
        assert [n for n in truncated if n <= 128] == [49, 98, 103, 107]
    else:
        assert len(truncated) == 35


def test_expand_v_is_the_plain_quotient_where_that_works():
    assert expand_v_for(64, 128) == 2.0
    assert expand_v_for(49, 128) == math.nextafter(128 / 49, math.inf)


@pytest.mark.parametrize("hidden_size", [64, 1000, 2048, 2304])
def test_delta_net_keeps_every_d_k_through_the_config(hidden_size):
    base = {**DELTA, "hidden_size": hidden_size, "expand_v": 1.0}
    family = family_of(base)
    spec = family.spec(base)
    for n in range(1, hidden_size // 4 + 1):
        reduced = spec.with_d_k((n,) * 3)
        config = json.loads(json.dumps(family.config_with_d_k(base, reduced)))
        assert family.spec(config) == reduced
        assert math.isclose(hidden_size * config["expand_k"], n * 4)


@pytest.mark.parametrize(("base", "keys"), [(GATED, ("head_dim", "expand_v")), (DELTA, ("expand_k",))])
def test_a_d_k_per_layer_is_a_list_and_one_for_all_is_not(base, keys):
    family = family_of(base)
    spec = family.spec(base)
    mixed, uniform = spec.with_d_k((16, 7, 8)), spec.with_d_k((8, 8, 8))
    config = json.loads(json.dumps(family.config_with_d_k(base, mixed)))
    assert all(isinstance(config[key], list) and len(config[key]) == 3 for key in keys)
    assert family.spec(config) == mixed
    # from one list to another, and back to one for all
    assert family.spec(family.config_with_d_k(config, spec.with_d_k((1, 2, 3)))).d_k == (1, 2, 3)
    config = family.config_with_d_k(config, uniform)
    assert not any(isinstance(config[key], list) for key in keys)
    assert family.spec(config) == uniform
    # nothing else changes
    assert {k: v for k, v in config.items() if k not in keys} == {
        k: v for k, v in base.items() if k not in keys
    }


@pytest.mark.parametrize(
    "config",
    [
        GATED,
        DELTA,
        {**GATED, "conv_bias": True},
        {**GATED, "head_dim": [8, 4, 5], "expand_v": [3.0, 6.0, 4.8]},
    ],
)
def test_key_rows_are_all_of_the_key_axis_and_nothing_else(config):
    family = family_of(config)
    spec = family.spec(config)
    rows = key_rows(spec, family.tensors(spec))
    narrow = family.tensors(spec.with_d_k((1, 1, 1)))
    sizes = {name: n for m in family.tensors(spec) for name, n in zip(m.theirs, m.rows, strict=True)}
    sizes_narrow = {name: n for m in narrow for name, n in zip(m.theirs, m.rows, strict=True)}
    # Exactly the tensors whose size depends on d_k have a key axis.
    assert set(rows) == {name for name in sizes if sizes[name] != sizes_narrow[name]}
    for name, index in rows.items():
        mixer = spec.layers[int(name.split(".")[2])].mixer
        assert index.shape[1:] == (mixer.num_k_heads, mixer.d_k)
        # Every row is of one head and channel; rows left over are what a model without keys would have.
        assert len(index.unique()) == index.numel()
        assert index.min() >= 0 and index.max() < sizes[name]
        assert sizes[name] - index.numel() == sizes_narrow[name] - index.shape[0] * mixer.num_k_heads


def test_key_rows_are_head_major():
    spec = spec_of(GATED)
    rows = key_rows(spec, family_of(GATED).tensors(spec))
    assert rows["model.layers.1.attn.k_proj.weight"][0, 1, 5] == 1 * 32 + 5
    tensors = random_tensors(GATED)
    assert all(name in tensors for name in rows)


def test_with_d_k_needs_one_entry_a_layer():
    with pytest.raises(ValueError, match="d_k has 2 entries for 3 linear layers"):
        spec_of(GATED).with_d_k((8, 8))
    with pytest.raises(ValueError, match="d_k must be at least 1, got 0"):
        spec_of(GATED).with_d_k((8, 0, 8))
