"""The benchmarks that judge by themselves whether all is well do run, and say so."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_minute_of_soak_leaves_everything_as_it_was(tmp_path):
    result = subprocess.run(
        [sys.executable, "benchmarks/soak.py", "--minutes", "1", "--json", str(tmp_path / "soak.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "all as it should be" in result.stdout
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert figures["outcomes"]["200"] > 10 and figures["outcomes"]["left"] > 0


@pytest.mark.slow
def test_no_request_fails_while_servers_are_restarted_one_after_the_other(tmp_path):
    """The delay is many times the proxy's lag, so that a busy machine does not decide."""
    result = subprocess.run(
        [
            sys.executable,
            "benchmarks/rolling.py",
            "--drain-delay",
            "20",
            "--json",
            str(tmp_path / "rolling.json"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads((tmp_path / "rolling.json").read_text())
    assert figures["failed"] == {} and figures["while_restarting"] > 10
    assert len(figures["connections"]) >= 3, "clients came to the new servers"
