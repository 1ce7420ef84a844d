"""`lowkey-prune sweep`: the table that the report reads, the figures in it, and going on after an interruption."""

import json
import re
import tempfile

import pytest
from checkpoints import GATED, write_checkpoint
from pruning_runs import invoke
from typer.testing import CliRunner

import pruning.sweep
from modeling.checkpoint import open_checkpoint
from pruning.calibration import Encoder
from pruning.cli import app
from pruning.evaluation import compare, evaluation_windows, perplexity
from pruning.report.inputs import read_inputs
from pruning.sources import read_text

SMALL = (
    *("--width", 16, "--seed", 0, "--align", 16, "--tokens", 256, "--window-length", 64),
    *("--heldout-tokens", 1024, "--kl-tokens", 512),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "dense", GATED)
    (folder / "text").write_text(" ".join(f"{i * i}" for i in range(2000)))
    return folder


def arguments(made, out, *more):
    text = ("--text", made / "text", "--heldout", made / "text")
    return (
        "sweep",
        made / "dense",
        out,
        "--method",
        "l1",
        "--method",
        "random",
        "--per-layer",
        "l1",
        *text,
        *more,
    )


def run(*given, code=0):
    result = invoke(*given)
    assert result.exit_code == code, result.output + repr(result.exception)
    return result


def test_it_writes_what_the_report_reads(made, tmp_path):
    output = run(*arguments(made, tmp_path / "table.json", *SMALL)).output
    assert "3 checkpoints to measure, 0 of them done" in output and "l1, per layer" in output
    ((_, found),) = read_inputs([tmp_path / "table.json"]).tables
    rows = [(c.row, c.column, c.seed) for c in found.reduced]
    assert rows == [("l1", 16, 0), ("random", 16, 0), ("l1, per layer", 16, 0)]
    assert all(c.perplexity > 0 and c.kl > 0 and 0 < c.top1_agreement <= 1 for c in found.reduced)
    assert [len(c.loss_rise) for c in found.curves] == [3]
    assert found.kl_tokens == 512 and found.dense.tokens == 1024
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
    run("report", tmp_path / "r.html", tmp_path / "table.json")


@pytest.mark.parametrize("window", [512, 128])
def test_a_cell_is_what_prune_and_evaluate_give(made, tmp_path, window):
    run(*arguments(made, tmp_path / "table.json", *SMALL, "--window", window))
    run("prune", made / "dense", tmp_path / "reduced", "--method", "l1", "--keep", 16)
    cell, *_ = json.loads((tmp_path / "table.json").read_text())["reduced"]
    dense, reduced = (open_checkpoint(path) for path in (made / "dense", tmp_path / "reduced"))
    windows = evaluation_windows(Encoder(dense), read_text([made / "text"]), tokens=1024, window=window)
    model = reduced.load()
    assert cell["perplexity"] == perplexity(model, windows).perplexity
    _, divergence = compare(model, dense.load(), windows[: 512 // window])
    assert (cell["kl"], cell["top1_agreement"]) == (divergence.kl, divergence.top1_agreement)
    assert cell["d_k"] == list(reduced.spec.d_k)


def test_an_interrupted_sweep_goes_on_where_it_was(made, tmp_path, monkeypatch):
    whole = tmp_path / "whole.json"
    run(*arguments(made, whole, *SMALL))
    reduce, calls = pruning.sweep.reduce_checkpoint, []

    def third_fails(*given, **more):
        calls.append(given[2].method)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return reduce(*given, **more)

    monkeypatch.setattr(pruning.sweep, "reduce_checkpoint", third_fails)
    out = tmp_path / "out.json"
    result = run(*arguments(made, out, *SMALL), code=130)
    assert f"the same command goes on from {out}.partial" in result.output.replace("\n", "")
    assert not out.exists()
    partial = tmp_path / "out.json.partial"
    refused = run("report", tmp_path / "r.html", partial, code=2).output.replace("\n", "")
    assert "its kind is 'unfinished_pruning_table'" in refused
    other = run(*arguments(made, out, *SMALL, "--seed", 1), code=2).output.replace("\n", "")
    assert "differs in calibration; repeat its options to go on with it" in other
    kept = partial.read_bytes()
    for more, said in (
        (("--seed", 1, "--overwrite"), "6 checkpoints to measure, 0 of them done"),
        ((), "3 checkpoints to measure, 2 of them done"),
    ):
        assert said in run(*arguments(made, out, *SMALL, *more, "--dry-run")).output
        assert partial.read_bytes() == kept
    output = run(*arguments(made, out, *SMALL)).output
    assert "3 checkpoints to measure, 2 of them done" in output
    assert calls == ["l1", "random", "l1", "l1"], "no cell is measured twice"
    assert json.loads(out.read_text()) == json.loads(whole.read_text())
    assert not partial.exists()


def test_recovery_stands_beside_its_control(made, tmp_path):
    more = ("--recover", 600, "--batch", 1, "--per-layer", "none")
    out = tmp_path / "table.json"
    given = (
        "sweep",
        made / "dense",
        out,
        "--method",
        "l1",
        "--text",
        made / "text",
        "--heldout",
        made / "text",
    )
    output = run(*given, *SMALL, *more, "--width", 8).output
    table = json.loads(out.read_text())
    assert [cell["column"] for cell in table["reduced"]] == [16, 8] and len(table["controls"]) == 1
    assert all(cell["recovered"] < cell["perplexity"] for cell in table["reduced"])
    assert "recovered " in output and "control" in output
    assert table["options"]["recovery"]["settings"]["tokens"] == 600


def test_recovery_is_measured_in_the_windows_of_the_sweep(made, tmp_path, monkeypatch):
    measured, plan = [], pruning.sweep.plan

    def planned(*args, **options):
        run = plan(*args, **options)
        measured.append((tuple(run.heldout.shape), run.settings.window))
        return run

    monkeypatch.setattr(pruning.sweep, "plan", planned)
    given = (
        "sweep",
        made / "dense",
        tmp_path / "t.json",
        "--method",
        "l1",
        "--per-layer",
        "none",
        "--width",
        16,
    )
    text = ("--text", made / "text", "--heldout", made / "text")
    windows = ("--window", 128, "--heldout-tokens", 256, "--kl-tokens", 128)
    run(*given, *text, *windows, "--seed", 0, "--recover", 128, "--batch", 1)
    assert measured == [((2, 129), 128)]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--method", "best"), "method='best' is unknown"),
        (("--width", 33), "keep=33 must be between 1 and 32"),
        (("--per-layer", "pca"), "mixes channels"),
        (("--align", 3), "align=3 must be an even number"),
        (("--tokens", 10**9), "are more than"),
        (("--recover", 100, "--train", "some"), "train='some' must be one of"),
        (("--recover", 100, "--window", 8000, "--heldout-tokens", 0), "which are not two windows of 8000"),
        (("--device", "tpu"), "device='tpu'"),
    ],
)
def test_bad_usage_ends_with_2_before_anything_is_written(made, tmp_path, more, said):
    output = run(*arguments(made, tmp_path / "out.json", *SMALL, *more), code=2).output
    assert said in output.replace("\n", "")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_replaced_only_when_asked(made, tmp_path):
    out = tmp_path / "out.json"
    out.write_text("mine")
    assert "already exists" in run(*arguments(made, out, *SMALL), code=2).output
    assert out.read_text() == "mine"
    (tmp_path / "out.json.partial").write_text("mine too")
    assert "is not what an interrupted sweep leaves" in run(
        *arguments(made, out, *SMALL, "--overwrite"), code=2
    ).output.replace("\n", "")
    (tmp_path / "out.json.partial").unlink()
    run(*arguments(made, out, *SMALL, "--overwrite"))
    assert json.loads(out.read_text())["kind"] == "pruning_table"


def test_help_shows_examples():
    result = CliRunner().invoke(app, ["sweep", "--help"])
    assert (
        result.exit_code == 0 and "lowkey-prune sweep  demo/model table.json --device cuda" in result.output
    )


@pytest.mark.parametrize(
    ("more", "widths"),
    [
        (("--per-layer", "none"), "24 16 8 4"),
        (("--per-layer", "l1", "--align", 8), "24 16 8"),
        (("--per-layer", "l1"), "24 16"),
    ],
)
def test_widths_are_shares_of_the_models_own(made, tmp_path, monkeypatch, more, widths):
    """The model has 32 channels. Where widths are chosen per layer, none is below the alignment, 16 by default here."""
    planned = []
    monkeypatch.setattr("pruning.commands.sweep._plan", lambda sweep, table, **_: planned.append(sweep) or [])
    text = ("--text", made / "text", "--heldout", made / "text")
    run("sweep", made / "dense", tmp_path / "t.json", *text, *SMALL[2:], "--dry-run", *more)
    assert " ".join(map(str, planned[0].widths)) == widths


def test_nothing_to_remove_is_refused(made, tmp_path):
    text = ("--text", made / "text", "--heldout", made / "text")
    output = run("sweep", made / "dense", tmp_path / "t.json", *text, "--align", 32, code=2).output
    assert "none of 3/4, 1/2, 1/4 and 1/8 of d_k 32 is 32 or more" in output.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_dry_run_says_what_it_takes_and_writes_nothing(made, tmp_path, monkeypatch):
    monkeypatch.setattr(pruning.sweep.Measuring, "__init__", None)
    out, recovery = tmp_path / "t.json", ("--recover", 600, "--batch", 1)
    output = " ".join(run(*arguments(made, out, *SMALL, *recovery, "--dry-run")).output.split())
    assert "3 checkpoints to measure, 0 of them done" in output
    assert re.search(
        r"time: about .* on cpu \(widths .*, evaluation .*, recovery .*\), by one window", output
    )
    assert re.search(r"disk: \S+ [KM]B for a checkpoint at a time and \S+ [KM]B for its recovery; ", output)
    assert "calibration" not in output, "neither method reads statistics"
    output = run(*arguments(made, out, *SMALL, "--method", "drrqr", "--dry-run")).output
    assert "calibration: 256 tokens, 4 windows of 64; forward" in output and "memory: about" in output
    assert not list(tmp_path.iterdir())


def test_without_room_for_a_checkpoint_no_work_is_done(made, tmp_path, monkeypatch):
    monkeypatch.setattr("pruning.estimate.check_writable", lambda path: 1000)
    monkeypatch.setattr(pruning.sweep.Measuring, "__init__", None)
    output = run(*arguments(made, tmp_path / "t.json", *SMALL), code=2).output.replace("\n", " ")
    assert f"error: TMPDIR={tempfile.gettempdir()!r} needs " in output and "there is 1.0 KB free" in output
    assert not list(tmp_path.iterdir())


def test_exchanges_are_those_that_the_criterion_reports(made, tmp_path):
    options = ("--text", made / "text", "--tokens", 256, "--window-length", 64)
    methods = ("--method", "l1", "--method", "drrqr", "--method", "bilinear", "--per-layer", "none")
    run("sweep", made / "dense", tmp_path / "t.json", *options, "--heldout", made / "text", *methods, *SMALL)
    expected = {"l1": None}
    for method, key in (("drrqr", "swaps"), ("bilinear", "exchanges")):
        run("prune", made / "dense", tmp_path / method, "--method", method, "--keep", 16, *options)
        record = json.loads((tmp_path / method / "state_reduction.json").read_text())
        expected[method] = sum(head[key] for layer in record["selection"] for head in layer)
    table = json.loads((tmp_path / "t.json").read_text())
    assert {cell["method"]: cell["exchanges"] for cell in table["reduced"]} == expected
