"""What killed runs leave is named and never removed, and a progress file has one user."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from results import make

import lowkey.publishing
from lowkey.files import OutputError, check_new_file, check_writable
from lowkey.leftovers import note_leftovers
from lowkey.publishing import new_directory, new_file, sole_user

WORK = """
import sys
from pathlib import Path
from lowkey.publishing import new_directory
with new_directory(Path(sys.argv[1])) as directory:
    (directory / "half").write_bytes(bytes(3 * 10**6))
    print("working", flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_run_left_is_named_and_never_removed(tmp_path, caplog):
    out = tmp_path / "out"
    working = [
        subprocess.Popen([sys.executable, "-c", WORK, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in working:
        assert process.stdout.readline() == b"working\n"
    check_new_file(out, "out", overwrite=True)
    assert not caplog.records, "both are at work"
    working[0].kill()
    working[0].wait()
    make("directory", tmp_path / "out.kept")
    check_writable(out)
    assert not caplog.records, "it is asked for free space too"
    check_new_file(out, "out", overwrite=True)
    (note,) = caplog.messages
    left = Path(note.removeprefix("note: ").split(" (")[0])
    assert note == f"note: {left} (3.0 MB) was left by a run that was killed; remove it"
    assert (left / "new/half").stat().st_size == 3 * 10**6
    working[1].stdin.close()
    assert working[1].wait(240) == 0
    for process in working:
        process.stdout.close()
    working[0].stdin.close()
    assert sorted(tmp_path.iterdir()) == sorted([left, out, tmp_path / "out.kept"])


class KilledError(Exception):
    pass


def killed(out, *, old=False):
    """What a killed process leaves, which closes its files and does nothing else."""
    with suppress(KilledError), new_file(out) as temporary:
        temporary.write_text("half")
        if old:
            temporary.with_name("old").write_text("before")
        os.close(lowkey.publishing._own.pop(temporary.parent))
        raise KilledError
    return temporary.parent


def test_a_note_says_what_to_do_with_what_was_there_before(tmp_path, caplog):
    out = tmp_path / "out"
    left = killed(out, old=True)
    note_leftovers(out)
    (note,) = caplog.messages
    assert note == (
        f"note: {left} (10 bytes) was left by a run that was killed; its file old holds what {out} was before: move "
        "that back if you need it, then remove the rest"
    )


def test_only_what_looks_like_a_working_directory_is_named(tmp_path, caplog):
    (tmp_path / ".model.snapshot").mkdir()
    note_leftovers(tmp_path / "model")
    (tmp_path / ".model.snapshot" / "lock").touch()
    (tmp_path / ".model.snapshot" / "precious").touch()
    (tmp_path / ".model.filename").touch()
    note_leftovers(tmp_path / "model")
    assert not caplog.records


def test_what_goes_while_it_is_looked_at_is_not_named(tmp_path, monkeypatch, caplog):
    left = killed(tmp_path / "out")
    walk = os.walk

    def late(top):
        for found in list(walk(top)):
            shutil.rmtree(top)
            yield found

    monkeypatch.setattr(os, "walk", late)
    note_leftovers(tmp_path / "out")
    assert not left.exists() and not caplog.records


def test_leftovers_are_told_apart_where_only_files_open_for_writing_can_be_locked(
    tmp_path, monkeypatch, caplog
):
    """As on NFS."""
    flock = fcntl.flock

    def flock_of_nfs(descriptor, operation):
        writable = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        if not writable or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock_of_nfs)
    out = tmp_path / "out"
    with new_directory(out):
        note_leftovers(out)
    assert not caplog.records, "it was at work"
    left = killed(out)
    note_leftovers(out)
    assert [note.split(" (")[0] for note in caplog.messages] == [f"note: {left}"]


def test_a_progress_file_can_be_used_where_the_lock_is_never_the_file_that_was_opened(tmp_path, monkeypatch):
    asked = []

    def never(a, b):
        asked.append(a)
        assert len(asked) < 1000, "it tries for ever"
        return False

    monkeypatch.setattr(os.path, "samestat", never)
    with sole_user(tmp_path / "out.partial"):
        pass
    assert asked and not list(tmp_path.iterdir())


def test_a_progress_file_has_one_user(tmp_path):
    progress = tmp_path / "deep" / "out.partial"
    with sole_user(progress):
        with pytest.raises(OutputError, match=r"out\.partial is in use by another run"), sole_user(progress):
            pytest.fail("entered")
        with sole_user(tmp_path / "deep" / "another"):
            pass
    with sole_user(progress):
        pass
    assert not list(progress.parent.iterdir())
