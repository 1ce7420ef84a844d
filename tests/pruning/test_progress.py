"""What long work says of itself where there is no terminal, and what it leaves when it is stopped."""

import io
import itertools
import json
import re
import signal

import pytest
from checkpoints import GATED, write_checkpoint
from live_server import poll
from rich.console import Console
from typer.testing import CliRunner

import pruning.collection
import pruning.commands.recover
import pruning.progress
from lowkey.words import counted
from modeling.checkpoint import open_checkpoint
from pruning import estimate
from pruning.cli import app
from pruning.companions import RECOVERY
from pruning.interrupts import left_behind, put_off, saving
from pruning.progress import Busy, Meter, tokens_bar
from pruning.statistics import load_unfinished
from pruning.training import SAVE_SECONDS


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_line_says_how_far_how_fast_and_how_long():
    clock = Clock()
    meter = Meter("evaluating [dense]", 8192, clock=clock)
    assert meter.line() == "evaluating [dense]: 0 of 8,192 tokens, 1 s so far"
    meter.advance(2048)
    clock.now += 4
    assert meter.line() == "evaluating [dense]: 2,048 of 8,192 tokens, 512 tokens/s, about 12 s left"
    resumed = Meter("recovering", 1000, done=900, clock=clock)
    clock.now += 10
    resumed.advance(10)
    assert resumed.line() == "recovering: 910 of 1,000 tokens, 1 tokens/s, about 90 s left"
    waiting = Meter("loading the checkpoint", clock=clock)
    clock.now += 20
    assert waiting.line() == "loading the checkpoint: 20 s so far"


@pytest.fixture
def console(monkeypatch):
    monkeypatch.setattr(pruning.progress, "EVERY", 0.001)
    return Console(file=io.StringIO(), force_terminal=False, width=20, markup=False, emoji=False)


def test_lines_come_by_themselves_while_a_step_takes_long(console):
    with tokens_bar(console, "a path with [brackets] and :cat:", 10) as advance:
        advance(3)
        poll(lambda: console.file.getvalue().count("[brackets] and :cat:: 3 of 10 tokens") > 2, "lines")
    said = console.file.getvalue()
    with Busy(console, "reading") as busy:
        poll(lambda: "reading: " in console.file.getvalue(), "it says what it does")
        busy.say("drawing [x]")
        poll(lambda: "drawing [x]: " in console.file.getvalue(), "it says what it does next")
    after = console.file.getvalue()
    assert after.startswith(said) and all(line.strip() for line in after.splitlines())


@pytest.mark.parametrize("command", ["calibrate", "prune", "evaluate", "recover", "report"])
def test_every_long_command_speaks_while_it_works(tmp_path, monkeypatch, command):
    monkeypatch.setattr(pruning.progress, "EVERY", 0.001)
    dense = write_checkpoint(tmp_path / "dense", GATED)
    text = tmp_path / "text"
    text.write_text(" ".join(f"{i * i}" for i in range(2000)))
    reduced = tmp_path / "reduced"
    assert run("prune", dense, reduced, "--method", "l1", "--keep", 8).exit_code == 0
    tokens = ("--text", text, "--tokens", 1024)
    arguments, said = {
        "calibrate": (("calibrate", dense, tmp_path / "s", *tokens), "calibrating: "),
        "prune": (
            ("prune", dense, tmp_path / "o", "--method", "drrqr", "--keep", 8, *tokens),
            "calibrating: ",
        ),
        "evaluate": (("evaluate", dense, reduced, *tokens), f"perplexity and KL of {reduced}: "),
        "recover": (
            ("recover", dense, reduced, tmp_path / "o", *tokens, "--heldout", text, "--heldout-tokens", 512),
            "recovering",
        ),
        "report": (("report", tmp_path / "r.html", reduced), "drawing: "),
    }[command]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert said in result.stderr and said not in result.stdout


def run(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    dense = write_checkpoint(folder / "dense", GATED)
    (folder / "text").write_text(" ".join(f"{i * i}" for i in range(2000)))
    assert run("prune", dense, folder / "reduced", "--method", "l1", "--keep", 8).exit_code == 0
    return folder


def recover(made, out):
    text, heldout = (f"--{option}={made / 'text'}" for option in ("text", "heldout"))
    small = (
        "--tokens",
        1000,
        "--window-length",
        32,
        "--batch",
        4,
        "--heldout-tokens",
        512,
        "--evaluations",
        1,
    )
    return run("recover", made / "dense", made / "reduced", out, text, heldout, *small)


def calibrate(made, out):
    small = ("--tokens", 1024, "--window-length", 64, "--method", "taylor")
    return run("calibrate", made / "dense", out, "--text", made / "text", *small)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_calibration_saves_at_once_when_it_is_stopped(made, tmp_path, monkeypatch, number, step):
    """Steps are batches of 4 windows forward, then windows backward; nothing else would save within two minutes."""
    out, partial = tmp_path / "s", tmp_path / "s.partial"
    stop_after(monkeypatch, pruning.commands.calibrate, "tokens_bar", number, step)
    stopped = calibrate(made, out)
    assert stopped.exit_code == 128 + number
    assert f"interrupted: the same command goes on from {partial}\n" in stopped.stderr
    _, done = load_unfinished(partial)
    assert done == {"forward": 4 * min(step, 4), "backward": max(step - 4, 0), "batch": 4}
    monkeypatch.undo()
    for file in (out, tmp_path / "whole"):
        assert calibrate(made, file).exit_code == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes() and not partial.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_recovery_saves_at_once_when_it_is_stopped(made, tmp_path, monkeypatch, number):
    assert SAVE_SECONDS > 60
    out, saved = tmp_path / "out", tmp_path / "out.progress.safetensors"
    stop_after(monkeypatch, pruning.commands.recover, "training_bar", number, 2)
    stopped = recover(made, out)
    assert stopped.exit_code == 128 + number
    assert f"interrupted: the same command goes on from {saved}\n" in stopped.stderr
    monkeypatch.undo()
    resumed = recover(made, out)
    assert resumed.exit_code == 0 and "going on after step 3 of 8\n" in resumed.stderr
    assert recover(made, tmp_path / "whole").exit_code == 0
    assert open_checkpoint(out).sha256 == open_checkpoint(tmp_path / "whole").sha256 and not saved.exists()


def stop_after(monkeypatch, module, name, number, step):
    """Raise a signal in this process once the bar has been told of so many steps."""
    bar = getattr(module, name)

    class Stopping:
        def __init__(self, *args, **kwargs):
            self.bar, self.steps = bar(*args, **kwargs), 0

        def __enter__(self):
            advance = self.bar.__enter__()

            def advance_and_stop(*told):
                advance(*told)
                self.steps += 1
                if self.steps == step:
                    signal.raise_signal(number)

            return advance_and_stop

        def __exit__(self, *error):
            return self.bar.__exit__(*error)

    monkeypatch.setattr(module, name, Stopping)


def test_the_second_ctrl_c_is_not_put_off():
    before = signal.getsignal(signal.SIGINT)
    with put_off() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_work_never_ends_with_a_step_that_is_not_saved(tmp_path):
    file, done, saved = tmp_path / "partial", [], []

    def save(path):
        saved.append((path, len(done)))
        if len(saved) == 2:
            signal.raise_signal(signal.SIGINT)

    def work(every):
        done.clear()
        with saving(file, save, every) as step_done:
            while len(done) < 9:
                done.append("a step")
                step_done(last=len(done) == 9)

    with pytest.raises(KeyboardInterrupt):
        work(every=0.0)
    assert saved == [(file, 1), (file, 2), (file, 3)] and len(done) == 3
    work(every=10**6)
    assert saved[3:] == [(file, 9)]


def test_a_tenth_of_the_time_goes_into_saves_that_take_long(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("pruning.interrupts.time.monotonic", lambda: now)

    def saves(takes, seconds):
        nonlocal now
        at, end = [], now + seconds

        def save(path):
            nonlocal now
            at.append(now)
            now += takes

        with saving(tmp_path / "partial", save, 120.0) as step_done:
            while now < end:
                now += 1.0
                step_done()
        return at

    assert len(saves(takes=1.0, seconds=12_100)) == 100
    assert len(saves(takes=60.0, seconds=12_000)) == 20
    between = [b - a for a, b in itertools.pairwise(saves(takes=60.0, seconds=12_000))]
    assert {*between} == {600.0}


def test_what_cannot_go_on_says_what_is_left(made, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("pruning.commands.evaluate.evaluate_checkpoints", interrupted)
    stopped = run("evaluate", made / "dense", "--json", tmp_path / "e.json")
    assert (stopped.exit_code, stopped.stderr) == (130, "interrupted: nothing was written\n")
    monkeypatch.setattr("pruning.commands.prune.select", interrupted)
    text = ("--text", made / "text", "--tokens", 256, "--window-length", 64)
    stopped = run("prune", made / "dense", tmp_path / "o", "--method", "drrqr", "--keep", 8, *text)
    stats = tmp_path / "o.stats.safetensors"
    assert stopped.exit_code == 130
    assert (
        f"interrupted: nothing was written but {stats}; give --stats {stats} to go on from it"
        in stopped.stderr
    )
    assert stats.exists() and not (tmp_path / "o").exists()
    with pytest.raises(KeyboardInterrupt, match="inner"), left_behind("outer"), left_behind("inner"):
        raise KeyboardInterrupt


def test_time_said_includes_the_evaluation(made, tmp_path, monkeypatch):
    """With a second for each layer, and for each head, that is run: 3 layers, 48 windows; the model before runs alone,
    then both side by side."""
    monkeypatch.setattr(estimate, "_seconds", lambda run, device: 1.0)
    prune = ("prune", made / "dense", tmp_path / "o", "--keep", 8, "--dry-run")
    text = ("--text", made / "text", "--tokens", 256, "--window-length", 64)
    said = run(*prune, "--method", "drrqr", *text, "--evaluate").stdout
    assert "evaluation: 24,576 held-out tokens, before and after\n" in said
    assert "time: about 10 min on cpu (calibration 12 s, evaluation 10 min), by one window" in said
    said = run(*prune, "--method", "drrqr", *text).stdout
    assert "time: about 12 s on cpu, by one window" in said and "evaluation" not in said
    assert "time: about 10 min on cpu, by one" in run(*prune, "--method", "l1", "--evaluate").stdout


def test_recovery_says_its_plan(made, tmp_path, monkeypatch):
    """The plan: 8 steps of 4 windows, forward and backward and the teacher's forward, and held-out text three times."""
    monkeypatch.setattr(estimate, "_seconds", lambda run, device: 1.0)
    lines = recover(made, tmp_path / "out").stderr.splitlines()
    assert lines[0].startswith("gated_deltanet: 3 layers, ") and ", d_k 8, " in lines[0]
    trained = json.loads((tmp_path / "out" / RECOVERY).read_text())["trained_parameters"]
    parts = f"8 steps of 128; small, {trained:,} parameters; teacher {made / 'dense'}"
    assert lines[1] == f"training: 1,024 tokens, {parts}"
    training, measured = 32 * (4 + 4), 3 * 4
    assert re.match(
        r"memory: about \S+ MB \(weights in float32 \S+ MB, gradients and moments \S+ [KM]B, ", lines[2]
    )
    assert lines[3].startswith(
        f"time: about 4 min on cpu (training 4 min, held-out text {measured} s), by one window"
    )
    assert training + measured == 268
    assert lines[4].startswith("disk: ") and " for its progress; " in lines[4]


@pytest.mark.parametrize(
    ("count", "noun", "said"),
    [
        (1, "checkpoint", "1 checkpoint"),
        (0, "token", "0 tokens"),
        (2048, "token", "2,048 tokens"),
        (2, "batch", "2 batches"),
        (3, "forward pass", "3 forward passes"),
    ],
)
def test_nouns_are_counted(count, noun, said):
    assert counted(count, noun) == said
