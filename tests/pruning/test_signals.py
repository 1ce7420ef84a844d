"""SIGTERM and the like, at any moment of any command: one line, an exit code of its own, and nothing left."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from checkpoints import GATED, write_checkpoint
from typer.testing import CliRunner

from pruning.cli import app
from pruning.on_ray import connected

TEXT = ("--tokens", 256, "--window-length", 64)
RECOVER = ("--tokens", 200, "--window-length", 32, "--batch", 2, "--heldout-tokens", 512, "--evaluations", 1)

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
    """A dense checkpoint, a reduced one, statistics, and text."""
    folder = tmp_path_factory.mktemp("signals")
    write_checkpoint(folder / "dense", GATED)
    (folder / "text").write_text(" ".join(f"{i * i}" for i in range(2000)))
    for arguments in (
        ("prune", folder / "dense", folder / "reduced", "--method", "l1", "--keep", 8),
        ("calibrate", folder / "dense", folder / "s.safetensors", "--text", folder / "text", *TEXT),
    ):
        assert CliRunner().invoke(app, [*map(str, arguments)]).exit_code == 0
    return folder


def arguments(made, command, out):
    dense, reduced, text = made / "dense", made / "reduced", ("--text", made / "text")
    return {
        "calibrate": ("calibrate", dense, out, *text, *TEXT),
        "merge": ("merge", made / "s.safetensors", "--out", out),
        "prune": ("prune", dense, out, "--method", "l1", "--keep", 8, "--evaluate"),
        "recover": ("recover", dense, reduced, out, *text, "--heldout", made / "text", *RECOVER),
        "evaluate": ("evaluate", dense, reduced, *text, "--tokens", 512, "--window", 64, "--json", out),
        "report": ("report", out, reduced),
        "inspect": ("inspect", dense),
    }[command]  # fmt: skip


PHASES = {
    "reading text": ("calibrate", "pruning.options", "CalibrationText.draw", "after"),
    "hashing": ("calibrate", "hashlib", "file_digest", "after"),
    "loading": ("evaluate", "modeling.checkpoint", "Checkpoint.load", "before"),
    "writing a shard": ("prune", "pruning.surgery", "save_shard", "after"),
    "running the result": ("prune", "pruning.reduction", "check_runs", "before"),
    "evaluating": ("prune", "pruning.commands.prune", "perplexity_of", "before"),
    "just before the name": ("prune", "pruning.reduction", "write_json", "after"),
    "writing statistics": ("merge", "pruning.statistics", "save_file", "after"),
    "writing the recovered": ("recover", "pruning.recovery", "check_runs", "before"),
    "writing a page": ("report", "pathlib", "Path.write_text", "after"),
    "measuring": ("evaluate", "pruning.commands.evaluate", "evaluate_checkpoints", "after"),
    "looking": ("inspect", "modeling.checkpoint", "Checkpoint.check_tensors", "before"),
}


def stopped(made, phase, out, number):
    command, *where = PHASES[phase]
    line = [sys.executable, "-c", STOPPED, *where, *map(str, arguments(made, command, out))]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(line, text=True, **pipes)
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
    line = [sys.executable, "-c", "from pruning.cli import app; app()", *arguments(made, "prune", out)[:-1]]
    for _ in range(2):  # it is only named, and again by the next one
        done = subprocess.run(
            [*map(str, line), "--overwrite"], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0 and sorted(tmp_path.iterdir()) == sorted([out, left])
        note = f"note: {left} ({size / 1000:.1f} KB) was left by a run that was killed; remove it"
        assert note in done.stderr.splitlines()


def test_ray_does_not_take_the_signals_over(monkeypatch):
    """Its `init` sets a handler of its own, which ends the process with code 15."""
    ray = SimpleNamespace(
        init=lambda **options: signal.signal(signal.SIGTERM, lambda *_: sys.exit(15)), shutdown=lambda: None
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = signal.getsignal(signal.SIGTERM)
    with connected("local"):
        assert signal.getsignal(signal.SIGTERM) is before
