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


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_section_runs_and_says_what_it_found(tmp_path):
    out = tmp_path / "gpu_check.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_check.py", "--device", "cpu", "--small", "--out", out],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1100,
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    report = json.loads(out.read_text())
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
