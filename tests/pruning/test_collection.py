"""Calibration that is interrupted, killed, or given what another one left."""

import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from checkpoints import GATED, write_checkpoint
from typer.testing import CliRunner

from modeling.checkpoint import open_checkpoint
from pruning.calibration import Origin, tokens_sha256
from pruning.cli import app
from pruning.collection import collect
from pruning.errors import PruningError
from pruning.gradients import GRADIENTS
from pruning.statistics import load_statistics, load_unfinished, save_statistics

WINDOWS = torch.randint(1, 257, (10, 40), generator=torch.Generator().manual_seed(0))
ORIGIN = Origin("t", "0" * 64, 0, 10, 40, tokens_sha256(WINDOWS))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_checkpoint(tmp_path_factory.mktemp("c") / "c", GATED))


class InterruptedHereError(Exception):
    pass


def run(checkpoint, **options):
    options = {"origin": ORIGIN, "needed": GRADIENTS, "save_every": 0.0, **options}
    origin = options.pop("origin")
    return collect(checkpoint.load(), WINDOWS, origin, checkpoint.sha256, **options)


def same_bits(a, b):
    assert (a.origins, a.names) == (b.origins, b.names)
    for x, y in zip(a.layers.values(), b.layers.values(), strict=True):
        assert all(torch.equal(x[name], y[name]) for name in x)


def interrupt_after(calls):
    steps = []

    def advance(tokens):
        steps.append(tokens)
        if len(steps) > calls:
            raise InterruptedHereError

    return advance


# 3 batches forward (4, 4 and 2 windows), then 10 windows backward.
@pytest.mark.parametrize("calls", [1, 2, 3, 7, 12])
def test_an_interrupted_calibration_goes_on_to_the_same_bits(checkpoint, tmp_path, calls):
    partial = tmp_path / "s.partial"
    with pytest.raises(InterruptedHereError):
        run(checkpoint, partial=partial, advance=interrupt_after(calls))
    _, done = load_unfinished(partial)
    assert done == {"forward": min(4 * calls, 10), "backward": max(calls - 3, 0), "batch": 4}
    steps = []
    resumed = run(checkpoint, partial=partial, advance=steps.append)
    assert sum(steps) == 2 * WINDOWS.numel()
    assert steps[0] == 40 * (done["forward"] + done["backward"]), "what was done is not done again"
    same_bits(resumed, run(checkpoint))


def test_nothing_is_saved_before_its_time(checkpoint, tmp_path):
    run(checkpoint, partial=tmp_path / "s.partial", save_every=3600.0)
    assert not list(tmp_path.iterdir())


def test_what_another_calibration_left_is_refused_with_what_differs(checkpoint, tmp_path):
    partial = tmp_path / "s.partial"
    with pytest.raises(InterruptedHereError):
        run(checkpoint, partial=partial, advance=interrupt_after(2))
    with pytest.raises(PruningError, match="differs in the text or how it is drawn; .* --overwrite"):
        run(checkpoint, partial=partial, origin=replace(ORIGIN, tokens_sha256="f" * 64))
    with pytest.raises(PruningError, match="differs in what is collected;"):
        run(checkpoint, partial=partial, needed=())
    with pytest.raises(PruningError, match="differs in the batch;"):
        run(checkpoint, partial=partial, batch=2)
    other = open_checkpoint(write_checkpoint(tmp_path / "c", GATED, seed=7))
    with pytest.raises(PruningError, match="differs in the checkpoint;"):
        run(other, partial=partial)
    with pytest.raises(PruningError, match="is of a calibration that has not ended"):
        load_statistics(partial)
    partial.unlink()
    save_statistics(run(checkpoint), partial)
    with pytest.raises(PruningError, match="is a finished statistics file"):
        run(checkpoint, partial=partial)


SCRIPT = """
import os
import signal
import pruning.collection
from pruning.cli import app
pruning.collection.collect.__kwdefaults__["save_every"] = 0.0
save = pruning.collection.save_statistics
def save_and_wait(*args, **kwargs):
    pruning.collection.save_statistics = save
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    save(*args, **kwargs)
    os.read(reader, 1)  # the signal finds it at work, also one that came as soon as the file was there
pruning.collection.save_statistics = save_and_wait
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
app()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_goes_on_to_the_same_file(checkpoint, tmp_path, number):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"{i * i}" for i in range(2000)))

    def arguments(out):
        options = ["--text", str(text), "--tokens", "1024", "--window-length", "64", "--method", "loss-aware"]
        return ["calibrate", str(checkpoint.path), str(out), *options]

    out, whole = tmp_path / "s.safetensors", tmp_path / "whole.safetensors"
    partial = tmp_path / "s.safetensors.partial"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments(out)], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    # Killed before it has removed its working directory it would leave that.
    while not partial.exists() or list(tmp_path.glob(f".{partial.name}.????????")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 128 + number)
    assert not out.exists()
    if number == signal.SIGINT:
        assert f"the same command goes on from {partial}" in errors
    _, done = load_unfinished(partial)
    assert 0 < done["forward"] + done["backward"] < 32
    for path in (out, whole):
        result = CliRunner().invoke(app, arguments(path))
        assert result.exit_code == 0, result.output
    assert out.read_bytes() == whole.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"text.txt", "s.safetensors", "whole.safetensors"}
