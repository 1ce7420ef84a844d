"""The benchmarks that judge by themselves whether all is well do run, and say so."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"


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


def test_a_server_that_never_gets_ready_is_stopped(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from _serving import Server

    script, pid = tmp_path / "serve", tmp_path / "pid"
    script.write_text(f"#!/bin/sh\necho $$ > {pid}\necho running on http://127.0.0.1:1\nexec sleep 600\n")
    script.chmod(0o755)
    with pytest.raises(httpx.ConnectError):
        Server({"dense": tmp_path}, script=script)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


HYBRID = """
from dataclasses import replace
from types import SimpleNamespace

import torch
from checkpoints import GATED
from second_kind import AverageSpec, registered

import measure
from peer import peer_of
from prefill import rules
from modeling.families import family_of
from modeling.model import Model

spec = family_of(GATED).spec(GATED)
other, *linear = (replace(spec.layers[0], mixer=AverageSpec(48)), *spec.layers[1:])
with registered():
    hybrid = Model(replace(spec, layers=(other, *linear)))
    for layers in ((other, *linear), (other, other)):
        try:
            peer_of(Model(replace(spec, layers=layers)))
        except ValueError as e:
            print(e)
print(sorted(rules(hybrid, 1, 64)))
measure.open_checkpoint = lambda source: SimpleNamespace(spec=hybrid.spec, config=GATED)
print(measure.load("hybrid", 16, torch.float32).spec.d_k)
"""


def test_speed_is_of_linear_layers_wherever_they_are():
    """In a process of its own: the peer hides fla."""
    result = subprocess.run(
        [sys.executable, "-c", HYBRID],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks", SUPPORT)))},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    *refused, sides, d_k = result.stdout.splitlines()
    assert len(refused) == 2 and all("linear attention and a dense feed-forward" in line for line in refused)
    assert sides == "['rule_ours', 'rule_transformers']" and d_k == "(16, 16, 16)"


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
