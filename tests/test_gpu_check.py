"""scripts/gpu_check.py without a GPU: tiny shapes through Triton's interpreter, every section that a CPU can run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
    assert report["failures"] == [] and set(report["skipped"]) == {"check_peer", "check_capacity"}
    assert report["warm"]["failed"] == 0
    assert {"kernels", "parity", "bandwidth", "tuning", "decode"} <= set(report)
    text = report["engine"]["text gated_deltanet"]
    assert text["graphs"] == text["saved graphs"] == text["saved eager"] == ["equal"]
    for variant in ("dense", "reduced"):
        figures = report["server"][variant]
        assert figures["errors"] == 0 and figures["tokens"] == 2 * figures["streams"] * 8
        assert figures["api_cpu_seconds"] > 0


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
