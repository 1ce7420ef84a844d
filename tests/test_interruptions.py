"""Signals at the worst moments: nothing half done, and a last line that says what is left."""

import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

import pytest
from results import content, make

import lowkey.publishing
import lowkey.signals
from lowkey.files import OutputError, write_or_keep
from lowkey.publishing import remove_working_directories, replacing
from lowkey.signals import Terminated, ending_on_signals, handled_by, uninterrupted
from pruning.interrupts import going_on_from, saving


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_wait_for_what_is_done_whole(number, capsys):
    done = []

    def work():
        with uninterrupted():
            signal.raise_signal(number)
            signal.raise_signal(number)
            done.append("whole")
        done.append("went on")

    with pytest.raises(SystemExit) as e, ending_on_signals(lambda: done.append("cleaned")):
        work()
    assert e.value.code == 128 + number and done == ["whole", "cleaned"]
    assert capsys.readouterr().err == "interrupted: nothing was written\n"


def test_an_exception_on_its_way_is_not_hidden_by_a_signal(capsys):
    def work():
        with uninterrupted():
            signal.raise_signal(signal.SIGTERM)
            raise OutputError("what was computed is in there")

    with pytest.raises(SystemExit) as e, ending_on_signals(list):
        work()
    assert e.value.code == 143
    assert capsys.readouterr().err == "interrupted: what was computed is in there\n"
    noted = []
    with handled_by(lambda number, frame: noted.append(number)):
        with pytest.raises(OutputError, match="^what was computed is in there$"):
            work()
    assert noted == [signal.SIGTERM]


def test_only_the_first_signal_counts_and_the_clean_up_is_not_disturbed(tmp_path):
    """Also none that comes while the last line is written, when the first one was handled."""
    script = """
import signal, sys
from lowkey.signals import ending_on_signals
class Errors:
    def write(self, text):
        signal.raise_signal(signal.SIGTERM)
        sys.__stderr__.write(text)
    def flush(self): pass
sys.stderr = Errors()
def clean_up():
    signal.raise_signal(signal.SIGTERM)
    print("cleaned up")
with ending_on_signals(clean_up):
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.raise_signal(signal.SIGINT)
        print("undone")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "undone\ncleaned up\n")
    assert done.stderr == "interrupted: nothing was written\n"


def test_a_signal_after_the_progress_was_saved_does_not_take_the_words_away(tmp_path, capsys):
    saved = tmp_path / "progress"

    def work():
        with going_on_from(saved):
            try:
                with saving(saved, lambda path: path.write_text("x"), 1000.0) as step_done:
                    signal.raise_signal(signal.SIGTERM)
                    step_done()
            finally:
                signal.raise_signal(signal.SIGINT)

    for _ in range(2):  # the first command's end leaves nothing to the second one
        with pytest.raises(SystemExit) as e, ending_on_signals(list):
            work()
        assert e.value.code == 143
        assert capsys.readouterr().err == f"interrupted: the same command goes on from {saved}\n"


def test_another_kind_of_keyboard_interrupt_ends_a_command_like_ctrl_c():
    class Other(KeyboardInterrupt):
        pass

    with pytest.raises(SystemExit) as e, ending_on_signals(list):
        raise Other
    assert e.value.code == 130


def test_foreign_code_that_makes_another_exception_of_a_signal_is_interrupted_all_the_same(capsys):
    """As safetensors does where one comes while it makes a tensor."""

    def work():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    with pytest.raises(SystemExit) as e, ending_on_signals(list):
        work()
    assert e.value.code == 143 and capsys.readouterr().err == "interrupted: nothing was written\n"
    with pytest.raises(ValueError, match="of its own"), ending_on_signals(list):
        raise ValueError("of its own")


def test_signals_count_again_where_foreign_code_has_swallowed_the_first(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(lowkey.signals.time, "monotonic", lambda: now[0])
    went_on = []

    def work():
        for _ in range(2):
            with suppress(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
            went_on.append(now[0])
        now[0] += 11
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit) as e, ending_on_signals(list):
        work()
    assert e.value.code == 130 and went_on == [0.0, 0.0]


def test_a_command_in_another_command_forgets_nothing(tmp_path, capsys):
    def work():
        with ending_on_signals(list):
            make("file", tmp_path / "one")
        with replacing(tmp_path / "progress") as temporary:
            temporary.write_text("x")
        make("directory", tmp_path / "two")
        make("file", tmp_path / "three")
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(SystemExit), ending_on_signals(list):
        work()
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert capsys.readouterr().err == f"interrupted: {one}, {two} and {three} are written\n"
    with pytest.raises(SystemExit), ending_on_signals(list):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == "interrupted: nothing was written\n"


def test_a_copy_that_is_written_as_a_signal_comes_is_not_removed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    place = lowkey.publishing._place

    def interrupted(made, path):
        signal.raise_signal(signal.SIGTERM)
        place(made, path)

    monkeypatch.setattr(lowkey.publishing, "_place", interrupted)
    (tmp_path / "folder").write_text("no folder")
    with pytest.raises(SystemExit), ending_on_signals(remove_working_directories):
        write_or_keep(tmp_path / "folder" / "out", lambda path: make("file", path))
    (copy,) = tmp_path.glob("lowkey-*/out")
    assert content(copy) == "new" and capsys.readouterr().err == f"interrupted: {copy} is written\n"


@pytest.mark.parametrize("step", ["rmtree", "link", "mkdtemp"])
def test_a_signal_while_it_publishes_or_cleans_leaves_nothing_half(tmp_path, monkeypatch, step):
    module = {"rmtree": lowkey.publishing.shutil, "link": os, "mkdtemp": lowkey.publishing.tempfile}[step]
    real = getattr(module, step)

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        result = real(*args, **kwargs)
        signal.raise_signal(signal.SIGTERM)
        return result

    monkeypatch.setattr(module, step, interrupted)
    out = tmp_path / "out"
    with pytest.raises(SystemExit), ending_on_signals(remove_working_directories):
        make("file", out)
    assert list(tmp_path.iterdir()) == ([] if step == "mkdtemp" else [out])


def test_the_end_of_a_command_removes_what_a_signal_kept_from_being_removed(tmp_path, monkeypatch):
    remove = lowkey.publishing._remove

    def interrupted(directory):
        monkeypatch.setattr(lowkey.publishing, "_remove", remove)
        raise Terminated

    monkeypatch.setattr(lowkey.publishing, "_remove", interrupted)
    with pytest.raises(SystemExit) as e, ending_on_signals(remove_working_directories):
        make("directory", tmp_path / "out", meanwhile=lambda: signal.raise_signal(signal.SIGINT))
    assert e.value.code == 143 and not list(tmp_path.iterdir())
