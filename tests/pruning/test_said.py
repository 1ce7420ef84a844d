"""What is printed is what was meant: help and messages with brackets in them, requests that would change nothing."""

import json
import re

import pytest
import typer
from checkpoints import GATED, write_checkpoint

from modeling.checkpoint import open_checkpoint
from pruning.commands import calibrate, evaluate, inspect, merge, prune, recover, report


def plain(text):
    return " ".join(text.replace("│", " ").split())


MODULES = (calibrate, evaluate, inspect, merge, prune, recover, report)


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_help_shows_every_bracket_that_was_written(run, module):
    name = module.__name__.rpartition(".")[2]
    function = module.merge_files if name == "merge" else getattr(module, name)
    alone = typer.Typer()
    alone.command()(function)
    written = " ".join([function.__doc__, *(p.help or "" for p in typer.main.get_command(alone).params)])
    shown = plain(run(name, "--help"))
    for bracketed in re.findall(r"\S*\[[^\]]*\]\S*", written):
        assert bracketed.strip("(),.;'") in shown


def test_help_names_the_extra_and_shows_what_is_in_brackets(run):
    assert "of the extra `eval`" in plain(run("report", "--help"))
    assert "hub id (org/name[@revision])" in plain(run("prune", "--help"))


@pytest.mark.parametrize("name", ["a[bold]b", "[red]x[/red]", "[/]", "x:smile:y"])
def test_paths_are_shown_as_they_are(run, tmp_path, name):
    (tmp_path / "text [dim]").write_text(" ".join(f"{i * i}" for i in range(2000)))
    dense = write_checkpoint(tmp_path / "checkpoints" / name.replace("/", "|"), GATED)
    out = f"{name.replace('/', '|')}-out"
    text = ("--text", "text [dim]", "--tokens", 512)
    output = run("prune", dense, out, "--method", "drrqr", "--keep", 8, *text)
    assert f"{out}  gated_deltanet, 3 layers" in output and f"from {dense}, sha256" in output
    assert "text [dim] (sha256" in output
    assert f"{out}  gated_deltanet, 3 layers" in run("inspect", out)
    table = run("evaluate", out, *text)
    assert "1 checkpoint, 512 tokens of text [dim]" in plain(table) and out in table
    assert f"{out}-stats: 512 tokens" in run("calibrate", dense, f"{out}-stats", *text)
    assert f"out='{out}' already exists" in run("prune", dense, out, "--method", "l1", "--keep", 8, code=2)
    assert f"{name}-none: no such directory" in run("inspect", f"{name}-none", code=2)
    assert f"part='{name}' is unknown" in run("evaluate", dense, "--part", name, code=2)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (("--keep", 32), "keep=32"),
        (("--ratio", 0.01), "ratio=0.01"),
        (("--state-bytes", "1GB"), "state_bytes='1GB'"),
        (("--state-bytes", "STATE"), "state_bytes="),
        (("--keep", 32, "--per-layer"), "keep=32"),
        (("--state-bytes", "1GB", "--per-layer"), "state_bytes='1GB'"),
    ],
)
def test_what_removes_nothing_is_refused(run, dense, tmp_path, options, given):
    state = open_checkpoint(dense).spec.state_bytes(0)
    options = [state if o == "STATE" else o for o in options]
    output = run("prune", dense, "out", "--method", "l1", *options, code=2)
    assert f"error: {given}" in output
    assert f"removes nothing: d_k is 32 and the state of one request {state:,} bytes as it is" in output
    assert not list(tmp_path.iterdir())


def test_one_byte_less_than_all_removes_something(run, dense):
    state = open_checkpoint(dense).spec.state_bytes(0)
    run("prune", dense, "out", "--method", "l1", "--state-bytes", state - 1)
    assert open_checkpoint("out").spec.d_k == (16, 16, 16)
    run("prune", dense, "wide", "--method", "l1", "--keep", 31)


def test_an_output_that_the_server_will_refuse_is_announced(run, tmp_path):
    dense = write_checkpoint(tmp_path / "dense", GATED)
    note = "has no tokenizer.json, so the output has none: lowkey-serve refuses it until one is put there"
    prune = ("prune", dense, "--method", "l1", "--keep", 8)
    assert note not in run(*prune, "fine")
    (dense / "tokenizer.json").unlink()
    assert f"note: {dense} {note}" in run(*prune, "plan", "--dry-run")
    assert f"note: {dense} {note}" in run(*prune, "bare")
    assert not (tmp_path / "bare" / "tokenizer.json").exists()


@pytest.mark.parametrize("option", ["--text", "--dataset"])
def test_an_empty_name_is_not_the_working_directory(run, tmp_path, option):
    """It comes from a shell variable that is not set."""
    write_checkpoint(tmp_path / "dense", GATED)
    pytest.importorskip("datasets") if option == "--dataset" else None
    assert "names nothing" in plain(run("calibrate", "dense", "s.safetensors", option, "", code=2))
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


def test_what_a_checkpoint_says_cannot_steer_the_terminal_or_fail_to_be_shown(run, tmp_path):
    path = write_checkpoint(tmp_path / "dense", GATED)
    config = {**GATED, "auto_map": {"AutoModel": "\x1b[2J.C", "AutoConfig": "\ud800.C"}}
    (path / "config.json").write_text(json.dumps(config))
    said = run("prune", "dense", "out", "--method", "l1", "--keep", 16, "--dry-run")
    assert "(\\ud800.py, \\x1b[2J.py)" in said.replace("\n", "") or "(\\x1b[2J.py, \\ud800.py)" in said
    run("prune", "dense", "out", "--method", "l1", "--keep", 16)
    record = json.loads((tmp_path / "out/state_reduction.json").read_text())
    record["source"]["name"] = "\x1b]0;title\x07 \ud800"
    (tmp_path / "out/state_reduction.json").write_text(json.dumps(record))
    shown = run("inspect", "out")
    assert "from \\x1b]0;title" in shown and " \\ud800," in shown and "\x1b" not in shown
