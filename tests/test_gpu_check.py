"""scripts/gpu_check.py without a GPU: tiny shapes through Triton's interpreter, every section that a CPU can run."""

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

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
    assert report["failures"] == [] and set(report["skipped"]) == {
        "check_peer",
        "check_capacity",
        "check_prompts",
    }
    assert report["warm"]["failed"] == []
    assert {"kernels", "parity", "bandwidth", "tuning", "decode"} <= set(report)
    text = report["engine"]["text gated_deltanet"]
    assert text["graphs"] == text["saved graphs"] == text["saved eager"] == ["equal"]
    server = report["server"]
    for variant in ("dense", "reduced"):
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
    assert all(
        report["engine"][f"d_k {d_k}, {streams} streams"] > 0 for d_k in (128, 64) for streams in (2, 4)
    )
    startup = report["startup"]
    assert all(startup[name]["seconds"] > 0 for name in ("empty caches", "warm caches"))
    assert set(startup["warm caches"]["parts"]["dense"]) == {
        "processes and imports",
        "first steps",
        "states and graphs",
    }


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
