"""What hybrids' configs may say: options that we don't run, sizes that no model has, keys at either level."""

import copy
import json

import pytest
from hybrid_cases import CASES
from hybrids import write_hybrid

from modeling.checkpoint import open_checkpoint
from modeling.families import FAMILIES, ConfigError, family_of, key_rows

NESTED, TEXT, MOE, NEXT, OLMO = "vl-dense-tied", "text-dense-tied", "vl-moe-fused", "next-some-dense", "olmo"


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    made = {name: write_hybrid(folder / name, CASES[name]) for name in (NESTED, TEXT, MOE, NEXT, OLMO)}
    return {name: json.loads((path / "config.json").read_text()) for name, path in made.items()}


def changed(configs, name, key, value):
    config = copy.deepcopy(configs[name])
    place = config
    if "text_config" in config and not key.startswith("^"):
        place = config["text_config"]
    place[key.removeprefix("^")] = value
    return config


@pytest.mark.parametrize(
    ("name", "key", "value", "said"),
    [
        (NESTED, "hidden_act", "gelu", "hidden_act='gelu'"),
        (NESTED, "attention_bias", True, "attention_bias=True"),
        (NESTED, "attn_output_gate", False, "attn_output_gate=False"),
        (NESTED, "output_gate_type", "relu", "output_gate_type='relu'"),
        (NESTED, "quantization_config", {"quant_method": "fp8"}, "Reduce the bf16 original, then quantise"),
        (NESTED, "^quantization_config", {"quant_method": "fp8"}, "Reduce the bf16 original, then quantise"),
        (NESTED, "^text_config", None, "text_config=None must be an object"),
        (NESTED, "model_type", "llama", "model_type='llama'"),
        (NESTED, "layer_types", ["linear_attention"] * 3, "layer_types="),
        (NESTED, "layer_types", ["mamba"] * 8, "layer_types=['mamba'"),
        (NESTED, "layer_types", ["full_attention"] * 8, "names no linear_attention"),
        (NESTED, "rope_parameters", {"rope_type": "yarn", "rope_theta": 1e7}, "rope_type='yarn'"),
        (NESTED, "rope_parameters", [1], "rope_parameters=[1] must be an object"),
        (NESTED, "rope_parameters", {"partial_rotary_factor": 0.01}, "rotates 0 channels"),
        (NESTED, "rope_parameters", {"partial_rotary_factor": 7.0}, "rotates 112 channels"),
        (NESTED, "linear_num_value_heads", 3, "linear_num_value_heads=3 must be a multiple"),
        (NESTED, "num_key_value_heads", 3, "num_attention_heads=4 must be a multiple of num_key_value_heads=3"),
        (NESTED, "linear_key_head_dim", [8, 8], "has 2 entries for linear_attention layers=6"),
        (NESTED, "linear_key_head_dim", 2**30, "rows of input projections"),
        (NESTED, "linear_value_head_dim", 2**31 - 1, "rows of input projections"),
        (NESTED, "num_hidden_layers", 10**9, "num_hidden_layers=1000000000"),
        (NESTED, "eos_token_id", "</s>", "eos_token_id='</s>'"),
        (NESTED, "^tie_word_embeddings", "yes", "tie_word_embeddings='yes'"),
        (MOE, "num_experts", 10**6, "num_experts=1000000"),
        (MOE, "num_experts_per_tok", 100, "num_experts_per_tok=100 must be at most num_experts="),
        (MOE, "mlp_only_layers", [1], "mlp_only_layers=[1]"),
        (NEXT, "norm_topk_prob", False, "norm_topk_prob=False"),
        (NEXT, "mlp_only_layers", 3, "mlp_only_layers=3 must be a list"),
        (NEXT, "decoder_sparse_step", 0, "decoder_sparse_step=0"),
        (OLMO, "attention_bias", True, "attention_bias=True"),
        (OLMO, "linear_allow_neg_eigval", 1, "linear_allow_neg_eigval=1"),
    ],
)  # fmt: skip
def test_what_we_do_not_run_is_refused_by_name_and_value(configs, name, key, value, said):
    family = FAMILIES[configs[name]["model_type"]]
    family.spec(configs[name])
    with pytest.raises(ConfigError) as e:
        family.spec(changed(configs, name, key, value))
    assert said in str(e.value) and str(e.value).startswith("config.json: ") and len(str(e.value)) < 600


def test_many_layers_of_many_experts_are_refused_before_their_names_are_made(configs):
    config = changed(configs, MOE, "num_experts", 1024)
    config["text_config"] |= {"num_hidden_layers": 1024, "layer_types": None}
    with pytest.raises(ConfigError, match="1024 layers with 1048576 experts in all; at most 131072"):
        family_of(config).spec(config)


@pytest.mark.parametrize("name", CASES)
def test_key_rows_are_what_grows_with_d_k(tmp_path, name):
    checkpoint = open_checkpoint(write_hybrid(tmp_path / name, CASES[name]))
    spec, family = checkpoint.spec, checkpoint.family
    narrow = family.tensors(spec.with_d_k((1,) * len(spec.d_k)), checkpoint.files)
    rows = key_rows(spec, checkpoint.maps)
    sizes, narrowed = (
        {their: n for m in maps for their, n in zip(m.theirs, m.rows, strict=True)}
        for maps in (checkpoint.maps, narrow)
    )
    assert set(rows) == {their for their in sizes if sizes[their] != narrowed[their]}
    for their, index in rows.items():
        mixer = spec.deltas[checkpoint.map_of[their].layer]
        assert index.shape[1:] == (mixer.num_k_heads, mixer.d_k)
        assert len(index.unique()) == index.numel() and index.min() >= 0 and index.max() < sizes[their]
        assert sizes[their] - narrowed[their] == index.shape[0] * mixer.num_k_heads * (mixer.d_k - 1)
    layer = spec.linear_layers[0]
    widths = {layer: 1}
    for their in rows:
        _, shape = checkpoint.dtype_and_shape(their)
        expected = narrowed[their] if checkpoint.map_of[their].layer == layer else shape[0]
        assert checkpoint.shape_with_d_k(their, widths) == [expected, *shape[1:]]


@pytest.mark.parametrize("name", [NESTED, TEXT, NEXT, OLMO])
def test_a_new_d_k_goes_where_the_old_one_was_and_nothing_else_changes(configs, name):
    config = configs[name]
    family = family_of(config)
    spec = family.spec(config)
    for widths in ((3,) * len(spec.d_k), (*range(1, len(spec.d_k) + 1),)):
        reduced = spec.with_d_k(widths)
        written = json.loads(json.dumps(family.config_with_d_k(config, reduced)))
        assert family.spec(written) == reduced
        text, was = written.get("text_config", written), config.get("text_config", config)
        assert text["linear_key_head_dim"] == (widths[0] if len({*widths}) == 1 else [*widths])
        assert {k for k in text.keys() | was.keys() if text.get(k) != was.get(k)} == {"linear_key_head_dim"}


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "must hold a JSON object"), ('{"eos_token_id": -1}', "eos_token_id=-1")],
)
def test_a_broken_generation_config_is_named(tmp_path, content, message):
    path = write_hybrid(tmp_path / "x", CASES[TEXT])
    (path / "generation_config.json").write_text(content)
    with pytest.raises(ValueError, match=message) as e:
        open_checkpoint(path)
    assert "generation_config.json" in str(e.value)
