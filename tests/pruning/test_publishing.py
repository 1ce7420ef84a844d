"""Outputs that appear while a command works stay, and the finished work is kept beside them."""

import os
import subprocess
import sys
import tempfile

import pytest
from pruning_runs import arguments, invoke, make_inputs

import pruning.commands.calibrate
import pruning.commands.evaluate
import pruning.commands.merge
import pruning.commands.prune
import pruning.recovery
import pruning.report.page
import pruning.sweep
from modeling.checkpoint import open_checkpoint
from pruning.evaluation.record import read_evaluation
from pruning.report.inputs import read_inputs
from pruning.statistics import load_statistics


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("publishing"))


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def run(command, out, *more, code=0):
        result = invoke(*arguments(made, command, out), *more)
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return run


WORK = {
    "calibrate": (pruning.commands.calibrate, "collect"),
    "merge": (pruning.commands.merge, "merge"),
    "prune": (pruning.commands.prune, "select"),
    "recover": (pruning.recovery, "train"),
    "evaluate": (pruning.commands.evaluate, "evaluate_checkpoints"),
    "sweep": (pruning.sweep.Measuring, "run"),
    "report": (pruning.report.page, "page"),
}
"""The work of each command, at whose end its output appears."""


def at_the_end_of_the_work(monkeypatch, command, do):
    module, name = WORK[command]
    real = getattr(module, name)

    def work(*args, **kwargs):
        result = real(*args, **kwargs)
        do()
        return result

    monkeypatch.setattr(module, name, work)


def whole(path, command):
    """Raises unless it is what the command makes."""
    if command in ("calibrate", "merge"):
        assert load_statistics(path).tokens == 256
    elif command == "evaluate":
        assert len(read_evaluation(path).checkpoints) == 2
    elif command == "sweep":
        assert len(read_inputs([path]).tables[0][1].reduced) == 2
    elif command == "report":
        assert path.read_text().rstrip().endswith("</html>")
    else:
        assert open_checkpoint(path).load() is not None


def kept_by(result):
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and " has appeared or changed since the command began" in last
    return type(result.stderr)(last.split("what was computed is in ")[1].split(";")[0])


@pytest.mark.parametrize("command", WORK)
@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_appears_stays_and_the_work_is_kept(run, tmp_path, monkeypatch, command, overwrite):
    out, folder = tmp_path / "o" / "out", tmp_path / "o"
    folder.mkdir()

    def appear():
        if command in ("prune", "recover"):
            out.mkdir()
            (out / "precious.txt").write_text("x")
        else:
            out.write_text("x")

    at_the_end_of_the_work(monkeypatch, command, appear)
    result = run(command, out, *(["--overwrite"] if overwrite else []), code=2)
    assert (out / "precious.txt" if out.is_dir() else out).read_text() == "x"
    kept = folder / os.path.basename(kept_by(result))
    whole(kept, command)
    assert sorted(folder.iterdir()) == sorted([out, kept])
    assert not list((tmp_path / "temporary").glob("lowkey-*")), "nothing was written twice"


@pytest.mark.parametrize("command", WORK)
def test_what_replaced_the_old_output_meanwhile_stays(run, tmp_path, monkeypatch, command):
    out = tmp_path / "o" / "out"
    run(command, out)
    with monkeypatch.context() as m:
        at_the_end_of_the_work(m, command, lambda: (out.rename(tmp_path / "moved"), out.write_text("mine")))
        result = run(command, out, "--overwrite", code=2)
    assert out.read_text() == "mine"
    whole(tmp_path / "moved", command)
    whole(tmp_path / "o" / os.path.basename(kept_by(result)), command)
    out.unlink()
    (tmp_path / "moved").rename(out)
    run(command, out, "--overwrite")
    whole(out, command)


def test_statistics_that_are_there_are_neither_replaced_nor_used_unasked(run, made, tmp_path):
    out, stats = tmp_path / "out", tmp_path / "out.stats.safetensors"
    stats.write_text("mine")
    said = run("prune with statistics", out, code=2).stderr
    assert (
        said
        == f"error: {stats} is there already; give --stats {stats} to use it, or --overwrite\n".replace(
            "\n", ""
        )
        + "\n"
    )
    assert stats.read_text() == "mine" and not out.exists()
    run("prune with statistics", out, "--overwrite")
    assert load_statistics(stats).tokens == 256
    given = ("prune", made / "dense", tmp_path / "again", "--method", "drrqr", "--keep", 8, "--stats", stats)
    assert invoke(*given).exit_code == 0


def test_prune_says_how_to_go_on_from_statistics_whose_name_was_taken(run, made, tmp_path, monkeypatch):
    out, stats = tmp_path / "out", tmp_path / "out.stats.safetensors"
    at_the_end_of_the_work(monkeypatch, "calibrate", lambda: stats.write_text("mine"))
    result = run("prune with statistics", out, code=2)
    kept = kept_by(result)
    assert result.stderr.splitlines()[-1].endswith(f"; give --stats {kept} to go on from it")
    assert stats.read_text() == "mine" and not out.exists()
    given = ("prune", made / "dense", out, "--method", "drrqr", "--keep", 8, "--stats", kept)
    assert invoke(*given).exit_code == 0


RACER = """
import sys
module, name = sys.argv[1:3]
del sys.argv[1:3]
import importlib
module = importlib.import_module(module)
real = getattr(module, name)
def work(*args, **kwargs):
    result = real(*args, **kwargs)
    print("made", flush=True)
    sys.stdin.read(1)
    return result
setattr(module, name, work)
from pruning.cli import app
app()
"""


def racers(made, command, out, count=2):
    module, name = WORK[command]
    line = [sys.executable, "-c", RACER, module.__name__, name, *map(str, arguments(made, command, out))]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return [subprocess.Popen(line, text=True, **pipes) for _ in range(count)]


@pytest.mark.parametrize("command", ["merge", "prune", "evaluate", "report"])
def test_of_two_runs_into_one_output_one_wins_and_the_other_says_where_its_result_is(made, tmp_path, command):
    out = tmp_path / "out"
    started = racers(made, command, out)
    for process in started:
        assert process.stdout.readline() == "made\n", process.stderr.read()
    for process in started:
        process.stdin.write("x")
        process.stdin.flush()
    ended = {}
    for process in started:
        _, errors = process.communicate(timeout=240)
        ended[process.returncode] = errors
    assert sorted(ended) == [0, 2]
    last = ended[2].splitlines()[-1]
    kept = tmp_path / os.path.basename(last.split("what was computed is in ")[1])
    assert sorted(tmp_path.iterdir()) == sorted([out, kept])
    whole(out, command)
    whole(kept, command)


@pytest.mark.parametrize("command", ["calibrate", "recover"])
def test_a_second_run_with_the_same_progress_file_is_refused_at_once(made, tmp_path, command):
    out = tmp_path / "out"
    (first,) = racers(made, command, out, 1)
    assert first.stdout.readline() == "made\n", first.stderr.read()
    result = invoke(*arguments(made, command, out))
    progress = out.with_name("out.partial" if command == "calibrate" else "out.progress.safetensors")
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {progress} is in use by another run; ")
    first.communicate("x", timeout=240)
    assert first.returncode == 0 and list(tmp_path.iterdir()) == [out]
    whole(out, command)
