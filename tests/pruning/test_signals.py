"""SIGTERM and the like, at any moment of any command: one line, an exit code of its own, and nothing left."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from pruning_runs import arguments, invoke, make_inputs

import lowkey.publishing
import pruning.commands.calibrate
import pruning.commands.merge
from pruning.on_ray import connected

STOPPED = """
import sys
module, name, when = sys.argv[1:4]
del sys.argv[1:4]
import importlib
owner = importlib.import_module(module)
*path, name = name.split(".")
for part in path:
    owner = getattr(owner, part)
real = getattr(owner, name)
def stop(*args, **kwargs):
    result = real(*args, **kwargs) if when == "after" else None
    setattr(owner, name, real)
    sys.stdin.close()
    print("there", flush=True)
    import time
    while True:
        time.sleep(0.05)
setattr(owner, name, stop)
from pruning.cli import app
app()
"""
"""The command, held before or after a call of a function."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("signals"))


PHASES = {
    "reading text": ("calibrate", "pruning.options", "CalibrationText.draw", "after"),
    "hashing": ("calibrate", "hashlib", "file_digest", "after"),
    "loading": ("evaluate", "modeling.checkpoint", "Checkpoint.load", "before"),
    "writing a shard": ("prune", "pruning.surgery", "save_shard", "after"),
    "running the result": ("prune", "pruning.reduction", "check_runs", "before"),
    "evaluating": ("prune", "pruning.commands.prune", "perplexity", "before"),
    "just before the name": ("prune", "pruning.reduction", "write_json", "after"),
    "writing statistics": ("merge", "pruning.statistics", "save_file", "after"),
    "writing the recovered": ("recover", "pruning.recovery", "check_runs", "before"),
    "writing a page": ("report", "pathlib", "Path.write_text", "after"),
    "measuring": ("evaluate", "pruning.commands.evaluate", "evaluate_checkpoints", "after"),
    "measuring a table": ("sweep", "pruning.sweep", "select", "before"),
    "writing a table": ("sweep", "pruning.sweep", "reduce_checkpoint", "after"),
    "looking": ("inspect", "modeling.checkpoint", "Checkpoint.check_tensors", "before"),
}


def stopped(made, phase, out, number):
    command, *where = PHASES[phase]
    more = ["--evaluate"] if command == "prune" else []
    return held(where, *arguments(made, command, out), *more, number=number)


def held(where, *given, number, **options):
    """Exit code and standard error of a command that gets a signal while it is held."""
    line = [sys.executable, "-c", STOPPED, *where, *map(str, given)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(line, text=True, **pipes, **options)
    said = ""
    while said != "there\n":
        said = process.stdout.readline()
        assert said, process.stderr.read()
    process.send_signal(number)
    _, errors = process.communicate(timeout=240)
    return process.returncode, errors


@pytest.mark.parametrize("phase", PHASES)
def test_sigterm_leaves_nothing_and_says_so(made, tmp_path, phase):
    code, errors = stopped(made, phase, tmp_path / "out", signal.SIGTERM)
    assert code == 143, errors
    *_, last = errors.splitlines()
    assert last.startswith("interrupted: ") and "Traceback" not in errors
    left = [p.name for p in tmp_path.iterdir()]
    if phase == "writing the recovered":  # what was trained stays, as after Ctrl-C
        assert left == ["out.progress.safetensors"] and "the same command goes on from" in last
    else:
        assert left == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_others_do_too(made, tmp_path, number):
    code, errors = stopped(made, "writing a shard", tmp_path / "out", number)
    assert code == 128 + number and errors.splitlines()[-1] == "interrupted: nothing was written"
    assert not list(tmp_path.iterdir())


def test_what_sigkill_leaves_is_named_by_the_next_run(made, tmp_path):
    out = tmp_path / "out"
    code, _ = stopped(made, "writing a shard", out, signal.SIGKILL)
    assert code == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    size = sum(p.stat().st_size for p in left.rglob("*") if p.is_file())
    line = [sys.executable, "-c", "from pruning.cli import app; app()", *arguments(made, "prune", out)]
    for _ in range(2):  # it is only named, and again by the next one
        done = subprocess.run(
            [*map(str, line), "--overwrite"], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0 and sorted(tmp_path.iterdir()) == sorted([out, left])
        note = f"note: {left} ({size / 1000:.1f} KB) was left by a run that was killed; remove it"
        assert [line for line in done.stderr.splitlines() if "was left by" in line] == [note]


def test_after_its_result_has_its_name_a_command_does_not_say_that_nothing_was_written(made, tmp_path):
    out = tmp_path / "out"
    code, errors = held(
        ("pruning.views", "tree", "before"), *arguments(made, "prune", out), number=signal.SIGTERM
    )
    assert code == 143 and errors.splitlines()[-1] == f"interrupted: {out} is written"
    assert list(tmp_path.iterdir()) == [out]


def test_a_signal_among_the_pictures_of_a_report_names_what_is_written(made, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "chromium").write_text("")
    (tmp_path / "bin" / "chromium").chmod(0o755)
    out = tmp_path / "o" / "out"
    given = (*arguments(made, "report", out), "--png", tmp_path / "pictures")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    where = ("pruning.report.png", "write_png", "before")
    code, errors = held(where, *given, number=signal.SIGTERM, env=environment)
    assert code == 143 and errors.splitlines()[-1] == f"interrupted: {out} is written"


COMMANDS = ("calibrate", "merge", "prune", "recover", "evaluate", "report")


def while_it_gets_its_name(monkeypatch, out, do):
    """Calls `do` when the command is about to give its result the name `out`."""
    place = lowkey.publishing._place

    def interrupted(made, path):
        if path == out:
            do()
        place(made, path)

    monkeypatch.setattr(lowkey.publishing, "_place", interrupted)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_while_the_result_gets_its_name_says_that_it_is_written(
    made, tmp_path, monkeypatch, command
):
    out = tmp_path / "out"
    while_it_gets_its_name(monkeypatch, out, lambda: signal.raise_signal(signal.SIGTERM))
    result = invoke(*arguments(made, command, out))
    assert result.exit_code == 143, result.output
    assert result.stderr.splitlines()[-1] == f"interrupted: {out} is written"
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_does_not_hide_where_a_result_was_kept(made, tmp_path, monkeypatch, command):
    out = tmp_path / "out"

    def appear():
        if not out.exists():
            out.write_text("mine")
            signal.raise_signal(signal.SIGTERM)

    while_it_gets_its_name(monkeypatch, out, appear)
    result = invoke(*arguments(made, command, out))
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 143, result.output
    assert last.startswith(f"interrupted: {out} has appeared or changed since the command began")
    kept = tmp_path / os.path.basename(last.split("what was computed is in ")[1])
    assert out.read_text() == "mine" and sorted(tmp_path.iterdir()) == sorted([out, kept])


def test_of_several_results_all_that_are_written_are_named(made, tmp_path, monkeypatch):
    out, stats = tmp_path / "out", tmp_path / "out.stats.safetensors"
    while_it_gets_its_name(monkeypatch, out, lambda: signal.raise_signal(signal.SIGINT))
    result = invoke(*arguments(made, "prune with statistics", out))
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == f"interrupted: {stats} and {out} are written"
    monkeypatch.undo()
    monkeypatch.setattr(pruning.commands.merge, "merge", lambda *_: signal.raise_signal(signal.SIGINT))
    said = invoke(*arguments(made, "merge", tmp_path / "merged")).stderr
    assert said.splitlines()[-1] == "interrupted: nothing was written", (
        "of the command before nothing is said"
    )


def test_a_calibration_interrupted_while_it_writes_its_result_can_go_on(made, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save_every = pruning.commands.calibrate.collect.__kwdefaults__
    monkeypatch.setitem(save_every, "save_every", 0.0)
    save = pruning.commands.calibrate.save_statistics

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        save(*args, **kwargs)

    monkeypatch.setattr(pruning.commands.calibrate, "save_statistics", interrupted)
    result = invoke(*arguments(made, "calibrate", out))
    progress = tmp_path / "out.partial"
    assert result.stderr.splitlines()[-1] == f"interrupted: the same command goes on from {progress}"
    assert list(tmp_path.iterdir()) == [progress]


def test_ray_does_not_take_the_signals_over(monkeypatch):
    """Its `init` sets a handler of its own, which ends the process with code 15."""
    ray = SimpleNamespace(
        init=lambda **options: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)), shutdown=lambda: None
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = signal.getsignal(signal.SIGTERM)
    with connected("local"):
        assert signal.getsignal(signal.SIGTERM) is before


def test_signals_that_ray_may_not_touch_are_left_alone(monkeypatch):
    """Only the main thread sets handlers, and one that is not Python's can't be set again."""
    ray = SimpleNamespace(init=lambda **options: None, shutdown=lambda: None)
    monkeypatch.setitem(sys.modules, "ray", ray)

    def connect():
        with connected("local"):
            return "connected"

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(connect).result() == "connected"
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    assert connect() == "connected"
