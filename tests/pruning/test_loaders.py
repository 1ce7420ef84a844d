"""Which loader runs which widths."""

import pytest
from checkpoints import DELTA, GATED
from hybrid_cases import CASES, IRREGULAR
from hybrids import config_of

from modeling.families import FAMILIES, family_of
from modeling.vllm_plugin import KNOWN
from pruning import loaders as module
from pruning.loaders import LOADERS, MODEL_TYPES, loaders, on_a_card, uneven, warnings

WHERE = {
    # model type, d_k, d_v -> the loaders that run it
    (
        "qwen3_5",
        (128,),
        128,
    ): "transformers, vLLM, vLLM with Lowkey's plugin, SGLang, mlx-lm, llama.cpp, Lowkey",
    ("qwen3_5", (96,), 128): "transformers, vLLM, vLLM with Lowkey's plugin, SGLang, mlx-lm, Lowkey",
    ("qwen3_5_moe", (64,), 128): "transformers, vLLM with Lowkey's plugin, SGLang, mlx-lm, Lowkey",
    ("qwen3_5_text", (64,), 128): "transformers, vLLM with Lowkey's plugin, SGLang, Lowkey",
    ("qwen3_next", (64,), 128): "transformers, vLLM with Lowkey's plugin, SGLang, mlx-lm, Lowkey",
    ("qwen3_next", (96,), 128): "transformers, vLLM, vLLM with Lowkey's plugin, mlx-lm, Lowkey",
    ("olmo_hybrid", (96,), 192): "transformers, vLLM, vLLM with Lowkey's plugin, mlx-lm, Lowkey",
    ("olmo_hybrid", (48,), 192): "transformers, vLLM, vLLM with Lowkey's plugin, mlx-lm, Lowkey",
    ("qwen3_5", (64, 64, 96), 128): "Lowkey",
    ("gated_deltanet", (64,), 256): "transformers, Lowkey",
    ("delta_net", (64, 80), 128): "Lowkey",
}


CONFIGS = {"gated_deltanet": GATED, "delta_net": DELTA} | {
    case.model_type: config_of(case) for case in reversed(CASES.values()) if case.layer_types != IRREGULAR
}


def config_and_spec(model_type, d_k, d_v=128):
    """A config of a model type, and its shapes with widths that are repeated over the layers."""
    config = CONFIGS[model_type]
    if model_type in ("gated_deltanet", "delta_net"):
        key = {"gated_deltanet": ("head_dim", d_v), "delta_net": ("hidden_size", d_v * config["num_heads"])}
        config = config | dict([key[model_type]]) | ({"expand_v": 1.0} if "expand_v" in config else {})
    elif "text_config" in config:
        config = config | {"text_config": config["text_config"] | {"linear_value_head_dim": d_v}}
    else:
        config = config | {"linear_value_head_dim": d_v}
    spec = family_of(config).spec(config)
    assert {m.d_v for m in spec.deltas.values()} == {d_v}
    return config, spec.with_d_k(tuple(d_k[i % len(d_k)] for i in range(len(spec.d_k))))


def asked(model_type, d_k, d_v=128):
    return loaders(*config_and_spec(model_type, d_k, d_v))


def how(model_type, d_k, d_v=128):
    return {v.loader.name: v.how for v in asked(model_type, d_k, d_v)}


def test_every_family_is_in_the_table():
    assert set(MODEL_TYPES) == set(FAMILIES)


@pytest.mark.parametrize(("model_type", "d_k", "d_v"), WHERE)
def test_where_a_checkpoint_runs(model_type, d_k, d_v):
    names = ", ".join(v.loader.name for v in asked(model_type, d_k, d_v) if v.runs)
    assert names == WHERE[model_type, d_k, d_v]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("d_k", [(5,), (48,), (64,), (96,), (128,), (32, 96)])
def test_every_refusal_has_a_reason(model_type, d_k):
    verdicts = asked(model_type, d_k)
    assert [v.loader for v in verdicts] == [*LOADERS]
    assert all(v.how for v in verdicts if not v.runs)


def test_what_it_takes():
    assert how("qwen3_5", [128])["vLLM"] == "" and how("olmo_hybrid", [48], 192)["vLLM"] == ""
    assert how("qwen3_5", [96])["vLLM"] == "on Hopper it needs --gdn-prefill-backend triton"
    assert (
        how("qwen3_5_text", [96])["vLLM"] == "from 0.27 on; on Hopper it needs --gdn-prefill-backend triton"
    )
    assert how("qwen3_5", [96])["vLLM with Lowkey's plugin"] == ""
    assert "Metal" in how("qwen3_next", [48])["mlx-lm"] and not how("qwen3_next", [64])["mlx-lm"]
    assert "masked" in how("qwen3_5", [64])["llama.cpp"]
    assert how("gated_deltanet", [64])["SGLang"] == "it has no such model"
    assert how("gated_deltanet", [64, 32])["transformers"] == "it has one d_k for all layers"


def lines(model_type, before, after, d_v=128):
    config, spec = config_and_spec(model_type, before, d_v)
    return [*warnings(config, spec, config_and_spec(model_type, after, d_v)[1])]


def test_the_lines_before_the_work():
    (vllm, llama) = lines("qwen3_5", [128], [64])
    assert vllm == (
        "note: d_k 64: vLLM 0.26.0 to 0.33.0 does not run it: its prefill kernel does not compile for d_k 64 and "
        "d_v 128; Lowkey's plugin brings one (docs/hybrids.md)"
    )
    assert llama.startswith("note: d_k 64: llama.cpp") and "masked" in llama
    first, _ = lines("qwen3_5", [128], [96])
    assert first.startswith("note: d_k 96: vLLM 0.26.0 to 0.33.0 runs it: on Hopper it needs --gdn-prefill")
    assert not lines("qwen3_5", [128], [128]) and not lines("olmo_hybrid", [96], [64], 192)
    (line,) = lines("gated_deltanet", [64], [32, 64], 64)
    assert (
        line
        == "note: d_k 32 to 64: transformers 5.24 does not run it: it has one d_k for all layers (docs/hybrids.md)"
    )


def test_what_the_model_had_lost_before_is_not_said_again():
    assert not lines("qwen3_5", [64], [32])
    (mlx,) = lines("qwen3_5", [64], [48])
    assert "mlx-lm" in mlx and "slowly" in mlx


def sglang(config):
    return {v.loader.name: v for v in loaders(config, family_of(config).spec(config))}["SGLang"]


@pytest.mark.parametrize("name", ["vl-dense-tied", "text-dense-tied", "next"])
def test_sglang_reads_an_interval_and_no_list_of_layers(name):
    config = config_of(CASES[name])
    inside = config.get("text_config", config)
    assert sglang(config).runs
    inside["full_attention_interval"] = 2
    assert "says 2 where its layers need 4" in sglang(config).how and not sglang(config).runs
    del inside["full_attention_interval"]
    assert "it needs full_attention_interval 4" in sglang(config).how and not sglang(config).runs


@pytest.mark.parametrize("name", ["vl-dense-odd-irregular", "text-dense-odd-irregular"])
def test_sglang_does_not_run_layers_in_an_order_that_no_interval_gives(name):
    verdict = sglang(config_of(CASES[name]))
    assert not verdict.runs and "no interval gives this model's order of layers" in verdict.how


def test_sglang_has_experts_in_all_layers_of_qwen3_next():
    verdict = sglang(config_of(CASES["next-some-dense"]))
    assert not verdict.runs and "experts in every layer" in verdict.how


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_lowkey_runs_layers_of_different_widths_and_hybrids_on_a_cpu(model_type):
    spec = config_and_spec(model_type, [16, 32])[1]
    (lowkey,) = [v for v in asked(model_type, [16, 32]) if v.runs]
    hybrid = model_type not in ("gated_deltanet", "delta_net")
    assert lowkey.loader.name == "Lowkey" and ("on a GPU not yet" in lowkey.how) == hybrid
    assert on_a_card(spec) != hybrid and on_a_card(config_and_spec(model_type, [16])[1])
    assert "Lowkey runs this" in uneven(spec) and ("on a CPU only" in uneven(spec)) == hybrid


def test_what_was_run_is_of_the_model_type():
    ran = {m: {v.loader.name: v.ran for v in asked(m, [128])} for m in MODEL_TYPES}
    assert "H200" in ran["qwen3_5"]["vLLM"] and "H200" in ran["qwen3_5"]["vLLM with Lowkey's plugin"]
    for model_type in set(MODEL_TYPES) - {"qwen3_5"}:
        assert ran[model_type]["vLLM"] == ran[model_type]["vLLM with Lowkey's plugin"] == "nothing"
    assert ran["gated_deltanet"]["mlx-lm"] == "nothing" and "GPU" in ran["gated_deltanet"]["Lowkey"]
    assert "on a CPU" in ran["olmo_hybrid"]["Lowkey"] and "GPU" not in ran["olmo_hybrid"]["Lowkey"]


def test_a_model_type_that_is_not_in_the_table_is_refused(monkeypatch):
    monkeypatch.setattr(module, "MODEL_TYPES", ("qwen3_next",))
    with pytest.raises(ValueError, match="model_type 'qwen3_5' is not one of qwen3_next"):
        asked("qwen3_5", [64])
    config, spec = config_and_spec("qwen3_5", [64])
    assert not [*warnings(config, spec, spec.with_d_k((32,) * len(spec.d_k)))]


def test_the_plugin_was_read_against_the_same_versions():
    assert f"{KNOWN[0]} to {KNOWN[-1]}" == module.VLLM_VERSIONS
