"""Calibration as a user types it: sources, shards, dry runs."""

import json
import os
from contextlib import nullcontext

import pytest
import torch
from typer.testing import CliRunner

from modeling.checkpoint import REDUCTION
from pruning.cli import app
from pruning.commands import calibrate
from pruning.statistics import load_statistics


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    lines = [json.dumps({"body": " ".join(f"{d}.{i * i}" for i in range(60))}) for d in range(30)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.jsonl").write_text("\n".join(lines))

    def run(*args, code=0):
        result = CliRunner().invoke(app, [str(a) for a in args])
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return run


JSON = ("--text", "data/train.jsonl", "--field", "body", "--window-length", 64)


def test_shards_of_one_draw_merge_to_what_one_machine_gets(run, dense):
    run("calibrate", dense, "whole", *JSON, "--tokens", 12 * 64, "--method", "loss-aware")
    for i in (1, 2):
        options = (*JSON, "--tokens", 12 * 64, "--method", "loss-aware", "--shard", f"{i}/2")
        run("calibrate", dense, f"part{i}", *options)
    run("merge", "part1", "part2", "--out", "merged")
    whole, merged = load_statistics("whole"), load_statistics("merged")
    assert merged.tokens == whole.tokens == 12 * 64
    assert [o.shard for o in merged.origins] == ["1/2 of 12 windows", "2/2 of 12 windows"]
    for a, b in zip(merged.layers.values(), whole.layers.values(), strict=True):
        assert all(
            torch.allclose(a[name], b[name], rtol=0, atol=1e-12 * float(b[name].abs().max())) for name in b
        )
    assert "the same tokens are there twice" in run("merge", "part1", "part1", "--out", "x", code=2).output


def test_a_data_set_is_a_source_too(run, dense, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    options = ("--dataset", tmp_path / "data", "--field", "body", "--tokens", 256, "--window-length", 64)
    run("prune", dense, "out", "--method", "energy", "--keep", 8, *options)
    (origin,) = json.loads((tmp_path / "out" / REDUCTION).read_text())["calibration"]["origins"]
    assert origin["text"] == f"{tmp_path / 'data'}, split train"
    assert origin["tokens"] == 256


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("calibrate", "new", *JSON, "--tokens", 200), ["calibration: 256 tokens, 4 windows of 64; forward"]),
        (
            ("prune", "new", "--method", "drrqr", "--keep", 8, *JSON, "--tokens", 256),
            ["d_k 32 => 8", "256 tokens"],
        ),
        (("prune", "new", "--method", "l1", "--keep", 8), ["d_k 32 => 8", "d_k 8: no multiple of 16"]),
        (
            (
                "prune",
                "new",
                "--method",
                "l1",
                "--keep",
                16,
                "--per-layer",
                "--align",
                8,
                *JSON,
                "--tokens",
                256,
            ),
            ["measured per layer for at most ", "10 forward passes over 256 tokens"],
        ),
    ],
)
def test_a_dry_run_says_everything_and_writes_nothing(run, dense, tmp_path, arguments, said):
    before = sorted(tmp_path.rglob("*"))
    command, out, *options = arguments
    result = run(command, dense, out, *options, "--dry-run")
    assert result.stdout.startswith(
        "gated_deltanet: 3 layers, hidden 64, 2 key heads, 4 value heads, d_k 32, d_v 24"
    )
    assert all(text in result.stdout for text in (*said, "disk: "))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_finds_out_whether_there_is_enough_text(run, dense):
    output = run("calibrate", dense, "new", *JSON, "--tokens", 10**6, "--dry-run", code=2).output
    assert "are more than train.jsonl gives" in output


def test_the_plan_comes_before_real_work_on_standard_error(run, dense):
    result = run("calibrate", dense, "s", *JSON, "--tokens", 256)
    assert "memory: about" in result.stderr and "time: about" in result.stderr
    assert result.stdout == "s: 256 tokens\n"


def test_pca_is_not_measured_with_masks(run, dense, tmp_path):
    options = ("--method", "pca", "--keep", 16, "--per-layer", *JSON, "--tokens", 256)
    assert "method='pca' mixes channels" in run("prune", dense, "out", *options, code=2).output
    assert not (tmp_path / "out").exists()


def test_shards_on_a_cluster_open_the_checkpoint_by_its_whole_path(run, dense, monkeypatch):
    class SeenError(Exception):
        pass

    def seen(job):
        raise SeenError(job.source)

    monkeypatch.setenv("HOME", str(dense.parent))
    monkeypatch.setattr(calibrate, "check_installed", lambda: None)
    monkeypatch.setattr(calibrate, "connected", lambda address: nullcontext())
    monkeypatch.setattr(calibrate, "room", seen)
    for source in (str(dense), f"~/{dense.name}", os.path.relpath(dense)):
        arguments = ["calibrate", source, "out", *map(str, JSON), "--tokens", "256", "--ray", "auto"]
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, SeenError), result.output + repr(result.exception)
        assert os.path.samefile(str(result.exception), dense) and os.path.isabs(str(result.exception))
