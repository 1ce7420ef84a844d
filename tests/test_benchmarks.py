"""The benchmark that judges by itself whether all is well does run, and says so."""

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
