"""scripts/gpu_check.py without a GPU: tiny shapes through Triton's interpreter, every section that a CPU can run."""

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from specs import mixer_spec

from modeling.state import DeltaState

ROOT = Path(__file__).parents[1]
HYBRIDS = (
    *("hybrids", "hybrid_speed", "hybrid_peer", "hybrid_experts", "hybrid_engine", "hybrid_server"),
    "pruning",
)
"""Sections of hybrid models."""


def check(directory, *options):
    """The report of a run through Triton's interpreter."""
    out = directory / "gpu_check.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = ROOT / "scripts" / "gpu_check.py"
    result = subprocess.run(
        [sys.executable, script, "--device", "cpu", "--small", "--out", out, *options],
        cwd=directory,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_section_runs_and_says_what_it_found(tmp_path):
    sections = ("kernels", "parity", "texts", "bandwidth", "engine", "server", "decode", "peer", "capacity")
    report = check(tmp_path, "--only", "warm", *sections, "tuning", "startup", "prompts")
    assert report["failures"] == [] and set(report["skipped"]) == {
        "check_peer",
        "check_capacity",
        "check_prompts",
    }
    assert report["warm"]["failed"] == []
    assert {"kernels", "parity", "bandwidth", "tuning", "decode"} <= set(report)
    steps = {name: row for name, row in report["kernels"].items() if name.startswith("step ")}
    assert {row["state_dtype"] for row in steps.values()} == {"float32", "int8"}
    assert all(row["code"] < 0.01 for row in steps.values() if row["state_dtype"] == "int8")
    assert sum(name.startswith("rounding ") for name in report["kernels"]) == 3
    for dtype in ("float32", "int8"):
        assert report["bandwidth"][f"step d_k 128 B 2 state {dtype}"]["state_dtype"] == dtype
        assert report["tuning"][f"d_k 128 B 2 state {dtype}"]["state_dtype"] == dtype
    text = report["engine"]["text gated_deltanet state float32"]
    assert text["graphs"] == text["saved graphs"] == text["saved eager"] == ["equal"]
    text = report["engine"]["text gated_deltanet state int8"]
    assert all(
        how.startswith("equal") for way in ("graphs", "saved graphs", "saved eager") for how in text[way]
    )
    variants = {"dense-float32": (128, "float32"), "dense-int8": (128, "int8"), "reduced-int8": (64, "int8")}
    server = report["server"]
    for variant, (_, dtype) in variants.items():
        for label, rounds in (
            ("2 streams", 2),
            ("4 streams", 2),
            ("2 streams, logprobs 5", 1),
            ("2 streams, text", 1),
        ):
            figures = server[f"{variant}, {label}"]
            assert len(figures) == rounds
            assert all(
                f["errors"] == 0 and f["tokens_per_second"] > 0 and f["api_cores"] > 0 for f in figures
            )
            assert all(f["state_dtype"] == dtype for f in figures)
    assert all(
        report["engine"][f"d_k {d_k} state {dtype}, {streams} streams"]["tokens_per_second"] > 0
        for d_k, dtype in variants.values()
        for streams in (2, 4)
    )
    assert report["engine"]["d_k 64 state int8 B 4"]["over_float32_dense"] > 0
    startup = report["startup"]
    assert all(startup[name]["seconds"] > 0 for name in ("empty caches", "warm caches"))
    assert set(startup["warm caches"]["parts"]["dense"]) == {
        "processes and imports",
        "first steps",
        "states and graphs",
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_section_of_hybrids_runs_and_says_what_it_found(tmp_path):
    report = check(tmp_path, "--only", "warm", *HYBRIDS)
    assert report["failures"] == [] and "skipped" not in report and report["warm"]["failed"] == []
    kernels = report["hybrid_kernels"]
    for kind, cases in (("attention", 12), ("experts", 4), ("product", 24)):
        assert sum(name.startswith(kind) for name in kernels) >= cases
    assert all(0 <= row["ours"] < 0.03 for row in kernels.values())
    assert {name.split()[1] for name in report["hybrids"]} == {"qwen3_5_moe_text", "olmo_hybrid"}
    assert all(row["fp32_logits"] < 1e-5 for row in report["hybrids"].values())
    texts = report["engine"]["text qwen3_5_moe_text d_k 128 state float32"]
    assert texts["graphs"] == texts["eager"] == texts["saved graphs"] == ["equal"]
    assert all(report["hybrid_texts"][way]["different"] == [] for way in ("invariant", "experts"))
    assert all(report["hybrid_texts"][way]["preempted"] > 0 for way in ("invariant", "graphs"))
    speed = report["hybrid_speed"]
    for d_k in (16, 8):
        for batch in (1, 3):
            row = speed[f"tiny d_k {d_k} B {batch} prompt 5"]
            assert row["step_s"]["q1"] <= row["step_s"]["median"] <= row["step_s"]["q3"]
            assert row["share_of_bound"] > 0 and row["ttft_s"] > 0
            assert report["hybrid_engine"][f"tiny d_k {d_k} B {batch}"]["tokens_per_second"] > 0
    assert (
        speed["tiny d_k 8 B 1 prompt 5"]["bytes"]["states"]
        < speed["tiny d_k 16 B 1 prompt 5"]["bytes"]["states"]
    )
    assert report["hybrid_peer"]["logits_difference"] < 1e-5
    assert 2 <= report["hybrid_experts"]["tiny-experts d_k 16 B 3 prompt 5"]["experts_hit"] <= 6
    server = report["hybrid_server"]
    assert all(len(server[f"{name}, 2 streams"]) == 2 for name in ("k16", "k8"))
    fit = [server[f"k16, requests of {n} tokens"]["alone"] for n in (256, 1024, 4096)]
    assert fit == sorted(fit, reverse=True) and fit[-1] > 0
    assert all(row["seconds"] > 0 and row["tokens_per_second"] > 0 for row in report["pruning"].values())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ways_of_launching_are_compared(tmp_path):
    report = check(tmp_path, "--only", "products", "attention")
    assert report["failures"] == [] and "skipped" not in report and report["products"]
    step = report["attention"]["tiny step B 2 x 5"]
    assert len(step["seconds"]) == 2 and all(s > 0 for s in step["seconds"].values())
    assert step["bound_s"] > 0 and report["attention"]["tiny prompts 2 x 9 behind 5"]["multiplications"] > 0


def test_a_step_of_a_hybrid_moves_what_its_shapes_say(monkeypatch):
    """The sizes of Qwen3.5-4B, computed by hand: 4.2 billion weights of 2 bytes, states of 51.5 MB (26.1 at d_k 64),
    and 32,768 bytes of keys and values for each token."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu_hybrid_speed import step_bytes

    from benchmarks.hybrid_models import config_of
    from modeling.families import family_of
    from modeling.model import Model
    from modeling.spec import StateTypes

    types = StateTypes(inputs=torch.bfloat16)
    for d_k, state, weights in ((128, 51.51e6, 8.41e9), (64, 26.05e6, 8.16e9)):
        config = config_of("4B", d_k)
        with torch.device("meta"):
            model = Model(family_of(config).spec(config)).to(torch.bfloat16)
            model.lm_head.weight = model.embeddings.weight
        pool = MagicMock(types=types, bytes_per_slot=model.spec.state_bytes(0, types))
        moved = step_bytes(model, pool, 32, 192)
        assert moved["kv"] == 32 * 192 * 32768
        assert moved["states"] == pytest.approx(2 * 32 * state, rel=1e-3)
        assert moved["weights"] == pytest.approx(weights, rel=5e-3)


def test_experts_that_no_token_goes_to_are_not_read():
    from benchmarks.hybrid_models import config_of, random_model, weight_bytes

    model = random_model(config_of("tiny-experts", 16))
    of_experts = sum(p.nbytes for name, p in model.named_parameters() if p.ndim == 3 and "ffn" in name)
    assert weight_bytes(model, 8) - weight_bytes(model, 2) == pytest.approx(of_experts * 6 / 8)
    assert (
        weight_bytes(model, 8) == sum(p.nbytes for p in model.parameters()) - model.embeddings.weight.nbytes
    )


def test_codes_of_a_state_may_be_those_on_either_side_of_a_middle_only(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu_kernels import random_state, state_errors

    spec = mixer_spec(num_v_heads=2, d_k=8)
    torch.manual_seed(0)
    state, rows = random_state(spec, 3, torch.bfloat16, "int8", "cpu"), torch.tensor([0, 2])
    exact = torch.randn(2, 2, 8, 16, dtype=torch.float64)
    exact[0, 0, :, 3] = torch.tensor([127, 7.5 - 1e-6, 7.4, 0, 0, 0, 0, 0])
    state.scatter(rows, DeltaState(exact, torch.zeros(2, spec.conv_channels, 3)))
    errors = state_errors(state, rows, exact)
    assert errors["scale"] < 1e-6 and errors["code"] < 1e-3 and errors["flips"] == 0
    state.recurrent[0, 0, 1, 3] = 8 if state.recurrent[0, 0, 1, 3] == 7 else 7
    errors = state_errors(state, rows, exact)
    assert errors["code"] < 1e-3 and errors["flips"] == 1 / exact.numel()
    state.recurrent[0, 0, 2, 3] = 8
    assert state_errors(state, rows, exact)["code"] > 0.09
    state.scales[2] *= 1.001
    assert state_errors(state, rows, exact)["scale"] > 5e-4
    state.scales[2, 1, 5] = torch.nan
    assert math.isnan(state_errors(state, rows, exact)["scale"])


def test_no_error_hides_behind_a_nan(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu_kernels import worst

    assert worst([1.0, 3.0, 2.0]) == 3.0
    assert math.isnan(worst([1.0, math.nan, 2.0])) and math.isnan(worst([math.nan, 1.0]))


def test_the_server_runs_the_widest_states_and_the_narrowest(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu_common import Run
    from gpu_engine import served

    run = Run("cuda", False, 0.0, tmp_path)
    assert served(run) == {
        "dense-float32": ("float32", 128),
        "dense-int8": ("int8", 128),
        "reduced-int8": ("int8", 64),
    }
    run.state_dtypes = ("int8",)
    assert served(run) == {"dense-int8": ("int8", 128), "reduced-int8": ("int8", 64)}


def test_a_section_says_what_it_has_no_time_for(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu_common import Run, SkippedError

    run = Run("cuda", False, time.monotonic() + 10_000, tmp_path)
    run.need(2000)
    run.section_end = time.monotonic() + 1000
    run.need(300)
    with pytest.raises(SkippedError, match="2000 s needed, \\d+ s left"):
        run.need(2000)
    run.deadline = 0.0
    with pytest.raises(SkippedError, match="1 s needed, 0 s left"):
        run.need(1)


def test_a_client_counts_the_events_of_an_answer_however_it_is_cut(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from gpu_client import Stream

    events = [b'data: {"choices":[{"text":"data: %d\\n"}]}\n\n' % n for n in range(5)]
    events += [
        b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":7}}\n\n',
        b"data: [DONE]\n\n",
    ]
    answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    answer += b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in events) + b"0\r\n\r\n"

    async def read(answer: bytes, size: int) -> Stream:
        stream = Stream([b"{}"], "host")
        stream.connection_made(MagicMock())
        for at in range(0, len(answer), size):
            stream.data_received(answer[at : at + size])
        return stream

    for size in (len(answer), 13, 20, 64):
        stream = asyncio.run(read(answer, size))
        request, following = stream.requests
        assert not following.events, "the next one has been sent"
        assert len(request.events) == 5 and request.tokens == 7 and stream.error is None
    refused = asyncio.run(read(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", 1000))
    assert refused.error is not None and "503" in refused.error
