"""The benchmarks that judge by themselves whether all is well do run, and say so."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(script, *options, json_file):
    """What a benchmark prints, and what it writes."""
    result = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *map(str, options), "--json", str(json_file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads(json_file.read_text())


def test_a_place_that_takes_no_file_is_found_out_before_the_work(tmp_path):
    writing = {
        file.name: file.read_text()
        for file in (ROOT / "benchmarks").glob("*.py")
        if re.search(r'"--json"|json: Annotated', file.read_text())
    }
    assert len(writing) > 7 and all("figures_file" in source for source in writing.values())
    (tmp_path / "file").write_text("a file")
    place = tmp_path / "file" / "figures.json"
    result = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "capacity.py", "--json", place],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"error: {place} can't be written: ") and result.stderr.count("\n") == 1


@pytest.mark.slow
def test_a_minute_of_soak_leaves_everything_as_it_was(tmp_path):
    output, figures = run("soak.py", "--minutes", 1, json_file=tmp_path / "soak.json")
    assert "all as it should be" in output
    assert figures["outcomes"]["200"] > 10 and figures["outcomes"]["left"] > 0


@pytest.mark.slow
def test_no_request_fails_while_servers_are_restarted_one_after_the_other(tmp_path):
    """The delay is many times the proxy's lag, so that a busy machine does not decide."""
    _, figures = run("rolling.py", "--drain-delay", 20, json_file=tmp_path / "rolling.json")
    assert figures["failed"] == {} and figures["while_restarting"] > 10
    assert len(figures["connections"]) >= 3, "clients came to the new servers"
