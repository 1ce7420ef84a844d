"""scripts/gpu_vllm.py without a GPU: its comparisons, and all of it with a stand-in for vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = """
import sys
sys.modules["fla"] = sys.modules["causal_conv1d"] = None
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

letters = pre_tokenizers.ByteLevel.alphabet()
tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(sorted(letters))}, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
for d_k in (16, 8):
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_key_head_dim=d_k, linear_value_head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=4, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(f"d{d_k}")
    tokenizer.save(f"d{d_k}/tokenizer.json")
"""
VLLM = """
import json, os
from importlib.metadata import entry_points
from types import SimpleNamespace as Space

__version__ = "0.26.0"
SamplingParams = Space

class LLM:
    def __init__(self, model, additional_config, **options):
        allowed = os.environ["VLLM_PLUGINS"].split(",")
        for plugin in entry_points(group="vllm.general_plugins"):
            if plugin.name in allowed:
                plugin.load()()
        narrow = json.load(open(f"{model}/config.json"))["linear_key_head_dim"] < 16
        if narrow and "lowkey" not in allowed:
            raise AssertionError("Mismatched type for mask_2d between then block and else block")
        assert additional_config == ({"gdn_prefill_backend": "triton"} if "lowkey" not in allowed else {})
        self.model = model

    def generate(self, prompts, params, use_tqdm):
        from pathlib import Path
        from gpu_vllm import run_transformers

        ids = [p["prompt_token_ids"] for p in prompts]
        rows = run_transformers(Path(self.model), ids, params.max_tokens, "cpu")["bfloat16"]
        print("INFO Lowkey: what the plugin says")
        return [
            Space(
                prompt_logprobs=[None, *({t: Space(logprob=x)} for t, x in zip(prompt[1:], scores, strict=True))],
                outputs=[Space(token_ids=tokens)],
            )
            for prompt, scores, tokens in zip(ids, rows["prompt"], rows["tokens"], strict=True)
        ]
"""
EXACT = {
    "prompt": [[-1.0, -2.0], [-3.0]],
    "tokens": [[5, 6], [7, 8]],
    "top": [
        [[[5, -0.1], [9, -3.0]], [[6, -0.5], [4, -0.6]]],
        [[[7, -0.1], [1, -9.0]], [[8, -0.2], [2, -4.0]]],
    ],
}
ROUNDED = {"prompt": [[-1.1, -2.0], [-3.2]], "tokens": [[5, 6], [7, 8]]}


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import gpu_vllm

    return gpu_vllm


def compared(script, **changes):
    served = {"prompt": [[-1.0, -2.1], [-3.1]], "tokens": [[5, 6], [7, 8]]} | changes
    return script.compare({"float32": EXACT, "bfloat16": ROUNDED}, served)


def test_what_is_as_near_to_float32_as_bfloat16_is_passes(script):
    row = compared(script)
    assert row["ok"] and row["texts_equal"] == row["texts_equal_to_transformers_bfloat16"] == 2
    assert row["vllm_from_float32"] == pytest.approx({"mean": 0.2 / 3, "max": 0.1})
    assert row["transformers_bfloat16_from_float32"] == pytest.approx({"mean": 0.1, "max": 0.2})
    assert row["vllm_from_transformers_bfloat16"] == pytest.approx({"mean": 0.1, "max": 0.1})
    assert row["prompt_tokens"] == 3 and row["tie"] == pytest.approx(0.4)


def test_other_probabilities_fail(script):
    assert not compared(script, prompt=[[-1.0, -2.5], [-3.2]])["ok"]


def test_a_text_may_leave_float32s_where_two_tokens_are_as_good(script):
    row = compared(script, tokens=[[5, 4], [7, 8]])
    assert row["ok"] and row["texts_equal"] == 1 and row["largest_gap"] == pytest.approx(0.1)
    assert not compared(script, tokens=[[9, 6], [7, 8]])["ok"]
    row = compared(script, tokens=[[5, 6], [7, 3]])
    assert not row["ok"] and row["largest_gap"] == float("inf")


def test_the_start_without_the_plugin_has_to_fail_as_said(script):
    whole = (None, "Traceback\n AssertionError('Mismatched type for mask_2d between')\nEngine failed")
    for result, good in ((whole, True), ((None, "out of memory"), False), (({"tokens": []}, ""), False)):
        results = {"transformers": (None, "no disk"), "vllm": (None, ""), "alone": result}
        compared, alone = script.judge({"d_k": 64}, results)
        assert alone["ok"] is good and not compared["ok"] and compared["error"] == "no disk"
    assert script.judge({}, {"transformers": (None, ""), "vllm": (None, ""), "alone": whole})[1]["error"] == (
        "AssertionError('Mismatched type for mask_2d between')"
    )


@pytest.mark.slow
def test_all_of_it_with_a_stand_in_for_vllm(tmp_path):
    def python(*arguments, **environment):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=600,
        )

    (tmp_path / "site" / "vllm").mkdir(parents=True)
    (tmp_path / "site" / "vllm" / "__init__.py").write_text(VLLM)
    made = python("-c", MAKE)
    assert made.returncode == 0, made.stderr
    result = python(
        *(ROOT / "scripts" / "gpu_vllm.py", "check", "d16", "d8", "--out", "rows.jsonl", "--new", "4"),
        *("--device", "cpu", "--limit", "500"),
        PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), str(ROOT), str(ROOT / "scripts")]),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["checkpoint"], row["plugin"], row["ok"]) for row in rows] == [
        ("d16", True, True),
        ("d8", True, True),
        ("d8", False, True),
    ]
    for row in rows[:2]:
        assert (
            row["vllm_from_float32"] == row["transformers_bfloat16_from_float32"]
            and row["prompt_tokens"] == 927
        )
        assert row["texts_equal_to_transformers_bfloat16"] == row["texts"] == 8
        assert row["said"] == ["Lowkey: what the plugin says"]
    assert "mask_2d" in rows[2]["error"]
