"""Which loader runs which widths."""

import pytest

from modeling.vllm_plugin import KNOWN
from pruning import loaders as module
from pruning.loaders import LOADERS, MODEL_TYPES, loaders, warnings

WHERE = {
    # model type, d_k, d_v -> the loaders that run it
    ("qwen3_5", (128,), 128): "transformers, vLLM, vLLM with Lowkey's plugin, SGLang, mlx-lm, llama.cpp",
    ("qwen3_5", (96,), 128): "transformers, vLLM, vLLM with Lowkey's plugin, SGLang, mlx-lm",
    ("qwen3_5_moe", (64,), 128): "transformers, vLLM with Lowkey's plugin, SGLang, mlx-lm",
    ("qwen3_5_text", (64,), 128): "transformers, vLLM with Lowkey's plugin, SGLang",
    ("qwen3_next", (64,), 128): "transformers, vLLM with Lowkey's plugin, SGLang, mlx-lm",
    ("qwen3_next", (96,), 128): "transformers, vLLM, vLLM with Lowkey's plugin, mlx-lm",
    ("olmo_hybrid", (96,), 192): "transformers, vLLM, vLLM with Lowkey's plugin, mlx-lm",
    ("olmo_hybrid", (48,), 192): "transformers, vLLM, vLLM with Lowkey's plugin, mlx-lm",
    ("qwen3_5", (64, 64, 96), 128): "",
    ("gated_deltanet", (64,), 256): "transformers, Lowkey",
    ("delta_net", (64, 80), 128): "Lowkey",
}


def how(model_type, d_k, d_v=128):
    return {v.loader.name: v.how for v in loaders(model_type, d_k, d_v)}


@pytest.mark.parametrize(("model_type", "d_k", "d_v"), WHERE)
def test_where_a_checkpoint_runs(model_type, d_k, d_v):
    names = ", ".join(v.loader.name for v in loaders(model_type, d_k, d_v) if v.runs)
    assert names == WHERE[model_type, d_k, d_v]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("d_k", [(5,), (48,), (64,), (96,), (128,), (32, 96)])
def test_every_refusal_has_a_reason(model_type, d_k):
    verdicts = loaders(model_type, d_k, 128)
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


def test_the_lines_before_the_work():
    (vllm, llama) = warnings("qwen3_5", [64] * 24, 128)
    assert vllm == (
        "note: d_k 64: vLLM 0.26.0 to 0.33.0 does not run it: its prefill kernel does not compile for d_k 64 and "
        "d_v 128; Lowkey's plugin brings one (docs/hybrids.md)"
    )
    assert llama.startswith("note: d_k 64: llama.cpp") and "masked" in llama
    first = next(warnings("qwen3_5", [96], 128))
    assert first.startswith("note: d_k 96: vLLM 0.26.0 to 0.33.0 runs it: on Hopper it needs --gdn-prefill")
    assert not [*warnings("qwen3_5", [128], 128)] and not [*warnings("olmo_hybrid", [64], 192)]
    (line,) = warnings("gated_deltanet", [32, 64], 64)
    assert (
        line
        == "note: d_k 32 to 64: transformers 5.24 does not run it: it has one d_k for all layers (docs/hybrids.md)"
    )


def test_what_nobody_asks_is_refused():
    with pytest.raises(
        ValueError, match="model_type 'llama' is not one of gated_deltanet, delta_net, qwen3_5"
    ):
        loaders("llama", [64], 128)
    for d_k, d_v in (([], 128), ([0], 128), ([64], 0)):
        with pytest.raises(ValueError, match="must be widths of 1 or more"):
            loaders("qwen3_5", d_k, d_v)


def test_the_plugin_was_read_against_the_same_versions():
    assert f"{KNOWN[0]} to {KNOWN[-1]}" == module.VLLM_VERSIONS
