"""Commands whose output place takes nothing, or no longer: one line, before the work, and nothing is lost."""

import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from pruning_runs import EVALUATE, arguments, invoke, make_inputs

import pruning.commands.calibrate
import pruning.commands.evaluate
import pruning.commands.prune
import pruning.recovery
from lowkey.files import OutputError, check_new_file, check_writable, write_or_keep
from lowkey.publishing import replacing
from modeling.checkpoint import Checkpoint, open_checkpoint
from pruning.evaluation.record import read_evaluation
from pruning.statistics import load_statistics


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("places"))


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()

    def run(command, out, *more, code=2):
        if command == "stats":
            given = (*arguments(made, "prune with statistics", tmp_path / "new"), "--stats", out)
        elif command == "pictures":
            given = (*arguments(made, "report", tmp_path / "new.html"), "--png", out)
        else:
            given = arguments(made, "prune with statistics" if command == "prune" else command, out)
        result = invoke(*given, *more)
        assert result.exit_code == code, result.output + repr(result.exception)
        return result

    return run


COMMANDS = ("calibrate", "merge", "prune", "stats", "recover", "evaluate", "report", "pictures")


def no_work(*args, **kwargs):
    pytest.fail("work began")


@pytest.mark.parametrize(
    ("command", "place"),
    [
        *itertools.product(COMMANDS, ("file/new", "file/deep/er/new", "/proc/new")),
        *((command, "x" * 250) for command in COMMANDS if command != "pictures"),
    ],
)
def test_a_place_that_takes_nothing_is_found_out_before_the_work(run, tmp_path, monkeypatch, command, place):
    """Also for root, who is let through by permission bits: a folder that is a file, the kernel's, a name too long."""
    (tmp_path / "file").write_text("a file")
    for module, name in (
        (Checkpoint, "load"),
        (pruning.commands.calibrate, "draw"),
        (pruning.commands.prune, "draw"),
        (pruning.recovery, "token_stream"),
    ):
        monkeypatch.setattr(module, name, no_work)
    monkeypatch.setattr("pruning.report.png.browser", lambda: "chromium")
    before = sorted(tmp_path.rglob("*"))
    result = run(command, tmp_path / place)
    assert result.stdout == "" and result.stderr.startswith("error: ")
    assert "can't be written" in result.stderr and result.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def taken_away(place: Path):
    """The folder `place` is gone and cannot come back: what a full disk or a lost mount is to a program at its end."""
    shutil.rmtree(place, ignore_errors=True)
    place.write_text("no folder any more")


@pytest.mark.parametrize(
    ("command", "module", "work"),
    [
        ("calibrate", pruning.commands.calibrate, "collect"),
        ("prune", pruning.commands.prune, "select"),
        ("recover", pruning.recovery, "train"),
        ("evaluate", pruning.commands.evaluate, "evaluate_checkpoints"),
    ],
)
def test_what_was_computed_is_kept_when_the_place_is_lost_meanwhile(
    run, tmp_path, monkeypatch, command, module, work
):
    run(command, tmp_path / "fine" / "out", code=0)
    real = getattr(module, work)

    def work_and_lose(*args, **kwargs):
        result = real(*args, **kwargs)
        taken_away(tmp_path / "lost")
        return result

    monkeypatch.setattr(module, work, work_and_lose)
    (tmp_path / "lost").mkdir()
    result = run(command, tmp_path / "lost" / "out")
    (kept,) = (tmp_path / "temporary").glob("lowkey-*/out")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ") and last.endswith(f"what was computed is in {kept}")
    fine = tmp_path / "fine" / "out"
    if command in ("prune", "recover"):
        assert open_checkpoint(kept).sha256 == open_checkpoint(fine).sha256
    elif command == "calibrate":
        assert kept.read_bytes() == fine.read_bytes()
    else:
        assert read_evaluation(kept) == read_evaluation(fine)
        assert "2 checkpoints, 512 tokens of text" in result.stdout, "the table is shown all the same"


def in_a_process(preamble, *arguments, stdout=subprocess.PIPE):
    """The command in a process of its own that first runs `preamble`."""
    script = f"{preamble}\nfrom pruning.cli import app; app()"
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=800, check=False,
        env={**os.environ, "PYTHONUNBUFFERED": ""},  # as users have it
    )  # fmt: skip


SMALL_FILES = "import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (2**16, 2**16))"
"""No file larger than 64 KB can be written, anywhere: a quota that is used up."""


@pytest.mark.parametrize("command", ["calibrate", "merge", "prune", "recover", "report"])
def test_where_nothing_large_can_be_written_one_line_says_so_and_nothing_is_left(made, tmp_path, command):
    out = tmp_path / "out"
    done = in_a_process(SMALL_FILES, *arguments(made, command, out))
    last = done.stderr.splitlines()[-1]
    assert (
        done.returncode == 2
        and last.startswith(f"error: {out} can't be written: ")
        and "File too large" in last
    )
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_where_nothing_at_all_can_be_written_it_is_found_out_before_the_work(made, tmp_path):
    options = ("--text", made / "text", *EVALUATE, "--json", tmp_path / "out")
    done = in_a_process(SMALL_FILES.replace("2**16", "2**10"), "evaluate", made / "dense", *options)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.endswith("takes no new file (File too large)\n") and not list(tmp_path.iterdir())


def test_figures_that_cannot_be_printed_are_written(made, tmp_path):
    out = tmp_path / "e.json"
    with open("/dev/full", "w") as full:
        options = ("--text", made / "text", *EVALUATE, "--json", out)
        done = in_a_process("", "evaluate", made / "dense", *options, stdout=full)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: [Errno 28]")
    assert len(read_evaluation(out).checkpoints) == 1


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 256 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("command", ["prune", "recover"])
def test_a_disk_that_is_too_small_is_refused_before_the_work(run, tiny_disk, monkeypatch, command):
    monkeypatch.setattr(Checkpoint, "load", no_work)
    result = run(command, tiny_disk / "out")
    assert f"error: out='{tiny_disk / 'out'}' needs " in result.stderr and " KB free" in result.stderr
    assert not list(tiny_disk.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_found_out_before_the_work(run, tiny_disk, monkeypatch, command):
    monkeypatch.setattr(Checkpoint, "load", no_work)
    monkeypatch.setattr("pruning.report.png.browser", lambda: "chromium")
    with pytest.raises(OSError, match="No space left"):
        (tiny_disk / "ballast").write_bytes(bytes(2**20))
    result = run(command, tiny_disk / "out")
    assert "takes no new file (No space left on device)" in result.stderr
    assert [p.name for p in tiny_disk.iterdir()] == ["ballast"]


def test_an_evaluation_does_not_replace_a_file_unless_told_to(run, tmp_path, monkeypatch):
    out = tmp_path / "e.json"
    out.write_text("mine")
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, "load", no_work)
        assert "already exists; choose another file or pass --overwrite" in run("evaluate", out).stderr
    assert out.read_text() == "mine"
    run("evaluate", out, "--overwrite", code=0)
    assert json.loads(out.read_text())["kind"] == "evaluation"


@pytest.mark.parametrize("command", ["calibrate", "merge", "evaluate", "sweep", "report"])
def test_devices_and_folders_are_no_files_to_replace(run, tmp_path, command):
    """A rename over /dev/null would leave every program of the machine with a file there."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for place in (fifo, tmp_path / "temporary"):
        result = run(command, place, "--overwrite")
        assert "is no regular file" in result.stderr
    assert fifo.is_fifo()


def test_a_recovery_whose_progress_cannot_be_saved_goes_on(run, tmp_path, monkeypatch, caplog):
    run("recover", tmp_path / "fine", code=0)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pruning.training.save_file", full)
    run("recover", tmp_path / "out", code=0)
    assert "going on unsaved: " in caplog.text and "No space left on device" in caplog.text
    assert open_checkpoint(tmp_path / "out").sha256 == open_checkpoint(tmp_path / "fine").sha256


def test_a_calibration_whose_progress_cannot_be_saved_goes_on(run, tmp_path, monkeypatch, caplog):
    run("calibrate", tmp_path / "fine", code=0)
    monkeypatch.setitem(pruning.commands.calibrate.collect.__kwdefaults__, "save_every", 0.0)
    (tmp_path / "out.partial").parent.mkdir(exist_ok=True)

    def full(*args, **kwargs):
        raise OutputError("out.partial can't be written: No space left on device")

    monkeypatch.setattr("pruning.collection.save_statistics", full)
    run("calibrate", tmp_path / "out", code=0)
    assert "going on unsaved: out.partial can't be written" in caplog.text
    assert load_statistics(tmp_path / "out").tokens == 256
    assert (tmp_path / "out").read_bytes() == (tmp_path / "fine").read_bytes()


def test_looking_leaves_nothing_and_says_what_is_free(tmp_path):
    free = check_writable(tmp_path / "not/yet/there")
    assert 0 < free <= shutil.disk_usage(tmp_path).total
    check_new_file(tmp_path / "new", "out", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    file = tmp_path / "deep/file"
    with replacing(file) as temporary:
        temporary.write_text("one")
        assert not file.exists()

    def fail():
        with replacing(file) as temporary:
            temporary.write_text("two")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OutputError, match=r"deep/file can't be written: No space left"):
        fail()
    assert file.read_text() == "one" and [p.name for p in file.parent.iterdir()] == ["file"]


def test_where_no_place_takes_the_result_both_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def write(path):
        raise OutputError(f"{path} can't be written: full")

    with pytest.raises(
        OutputError, match=r"^out can't be written: full; and neither can a copy: .*/out can't be"
    ):
        write_or_keep(Path("out"), write)
    assert not list(tmp_path.iterdir())
