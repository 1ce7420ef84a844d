"""What a command reads is not what it writes: --overwrite replaces earlier results, and never an input."""

import json
import os

import pytest
from checkpoints import GATED, random_tensors, write_checkpoint
from typer.testing import CliRunner

from pruning.cli import app

TEXT = ("--tokens", 256, "--window-length", 64)


def run(*arguments, code=2):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


@pytest.fixture
def made(tmp_path):
    write_checkpoint(tmp_path / "dense", GATED)
    (tmp_path / "text").write_text(" ".join(f"{i * i}" for i in range(2000)))
    run("prune", tmp_path / "dense", tmp_path / "reduced", "--method", "l1", "--keep", 8, code=0)
    run("calibrate", tmp_path / "dense", tmp_path / "s.safetensors", *TEXT, code=0)
    os.link(tmp_path / "text", tmp_path / "linked")
    return tmp_path


COMMANDS = {
    "weights": ("calibrate", "dense", "dense/model.safetensors", *TEXT),
    "text": ("calibrate", "dense", "text", "--text", "text", *TEXT),
    "hard link": ("calibrate", "dense", "linked", "--text", "text", *TEXT),
    "part": ("merge", "s.safetensors", "--out", "s.safetensors"),
    "config": ("evaluate", "dense", "--text", "text", "--json", "dense/config.json"),
    "scored text": ("evaluate", "dense", "--text", "text", "--json", "text"),
    "record": ("report", "reduced/state_reduction.json", "reduced"),
    "statistics": ("report", "s.safetensors", "s.safetensors"),
    "prune's": ("prune", "dense", "new", "--method", "drrqr", "--keep", 8, "--stats", "dense/tokenizer.json"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_that_is_read_is_refused_also_with_overwrite(made, monkeypatch, command):
    monkeypatch.chdir(made)
    before = {p: p.read_bytes() for p in made.rglob("*") if p.is_file()}
    result = run(*COMMANDS[command], "--overwrite")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    if command != "prune's":  # a statistics file that is there is to be used, and this is none
        assert "which is read; choose another file" in result.stderr
    assert {p: p.read_bytes() for p in made.rglob("*") if p.is_file()} == before


def test_results_beside_the_inputs_are_replaced(made, monkeypatch):
    monkeypatch.chdir(made)
    for _ in range(2):
        run(
            "evaluate",
            "dense",
            "--text",
            "text",
            "--tokens",
            512,
            "--window",
            64,
            "--json",
            "e.json",
            "--overwrite",
            code=0,
        )
    assert json.loads((made / "e.json").read_text())["kind"]


def test_statistics_in_the_output_are_refused_before_the_work(made, monkeypatch):
    monkeypatch.chdir(made)
    result = run("prune", "dense", "out", "--method", "drrqr", "--keep", 8, "--stats", "out/s.safetensors")
    said = "error: stats='out/s.safetensors' is in out='out', which is made later; name another place\n"
    assert result.stderr == said and not (made / "out").exists()


@pytest.mark.parametrize("command", ["calibrate", "prune"])
def test_overwrite_removes_no_file_that_is_no_progress(made, monkeypatch, command):
    monkeypatch.chdir(made)
    (made / "out.stats.safetensors.partial").write_text("precious")
    run(
        *{
            "calibrate": ("calibrate", "dense", "out.stats.safetensors", *TEXT),
            "prune": ("prune", "dense", "out", "--method", "drrqr", "--keep", 8, *TEXT),
        }[command],
        "--overwrite",
    )
    assert (made / "out.stats.safetensors.partial").read_text() == "precious"


def test_a_row_that_no_text_touches_is_found_by_an_evaluation_too(made, monkeypatch):
    monkeypatch.chdir(made)
    tensors = random_tensors(GATED)
    tensors["model.embeddings.weight"][-1, 0] = float("nan")
    write_checkpoint(made / "bad", GATED, tensors)
    result = run("evaluate", "dense", "bad", "--text", "text", "--tokens", 512, "--window", 64)
    assert result.stderr == "error: bad: tensor 'model.embeddings.weight' holds NaN or Inf\n"
