"""Results under their final names: never over something that appeared meanwhile, also where it appears at the worst
moment."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lowkey.publishing
from lowkey.files import OutputError, OutputTakenError, check_new_file, check_writable, found_at
from lowkey.publishing import new_directory, new_file, remove_working_directories, replacing, sole_user
from lowkey.signals import Terminated, ending_on_signals, uninterrupted

KINDS = ("file", "directory")


def make(kind, path, what="new", *, replaces=None, meanwhile=lambda: None):
    if kind == "file":
        with new_file(path, replaces=replaces) as temporary:
            temporary.write_text(what)
            meanwhile()
    else:
        with new_directory(path, replaces=replaces) as directory:
            (directory / "content").write_text(what)
            meanwhile()


def content(path):
    return (path if path.is_file() else path / "content").read_text()


def appear(path, kind, what="mine"):
    path.parent.mkdir(exist_ok=True)
    if kind == "directory":
        path.mkdir()
        path = path / "content"
    path.write_text(what)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_what_appears_meanwhile_stays_and_the_result_is_kept_beside_it(tmp_path, kind, other):
    out = tmp_path / "out.x"
    with pytest.raises(OutputTakenError, match=r"out\.x has appeared or changed since .* is in ") as e:
        make(kind, out, meanwhile=lambda: appear(out, other))
    assert content(out) == "mine" and content(e.value.kept) == "new" and str(e.value.kept) in str(e.value)
    assert sorted(tmp_path.iterdir()) == sorted([out, e.value.kept])
    assert not e.value.kept.name.startswith("."), "no remains of a killed run"
    assert e.value.kept.suffix == (".x" if kind == "file" else e.value.kept.suffix)
    assert e.value.kept.stat().st_mode & 0o777 == (0o755 if kind == "directory" else 0o644)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_there_is_replaced_if_it_is_still_the_same(tmp_path, kind):
    out = tmp_path / "out"
    make(kind, out, "old")
    make(kind, out, replaces=found_at(out))
    assert content(out) == "new" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", KINDS)
def test_what_took_the_place_of_the_old_one_stays(tmp_path, kind):
    out = tmp_path / "out"
    make(kind, out, "old")

    def another():
        out.rename(tmp_path / "moved")
        appear(out, kind)

    with pytest.raises(OutputTakenError) as e:
        make(kind, out, replaces=found_at(out), meanwhile=another)
    assert [content(p) for p in (out, tmp_path / "moved", e.value.kept)] == ["mine", "old", "new"]
    assert len(list(tmp_path.iterdir())) == 3


def test_a_file_put_into_the_directory_to_be_replaced_is_not_lost(tmp_path):
    out = tmp_path / "out"
    make("directory", out, "old")
    with pytest.raises(OutputTakenError) as e:
        make("directory", out, replaces=found_at(out), meanwhile=lambda: (out / "precious").write_text("x"))
    assert (out / "precious").read_text() == "x" and content(out) == "old" and content(e.value.kept) == "new"


@pytest.mark.parametrize("kind", KINDS)
def test_the_old_one_comes_back_if_the_new_one_cannot_be_placed(tmp_path, monkeypatch, kind):
    out = tmp_path / "out"
    make(kind, out, "old")
    place, calls = lowkey.publishing._place, []

    def fail_once(made, path):
        calls.append(path)
        if len(calls) == 1:
            assert not out.exists(), "put aside"
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        place(made, path)

    monkeypatch.setattr(lowkey.publishing, "_place", fail_once)
    with pytest.raises(OutputError, match="out can't be written: Input/output error"):
        make(kind, out, replaces=found_at(out))
    assert content(out) == "old" and list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("kind", KINDS)
def test_three_are_kept_if_one_appears_just_as_the_old_one_was_put_aside(tmp_path, monkeypatch, kind):
    out = tmp_path / "out"
    make(kind, out, "old")
    place = lowkey.publishing._place

    def appear_first(made, path):
        if path == out and not out.exists():
            appear(out, kind)
        place(made, path)

    monkeypatch.setattr(lowkey.publishing, "_place", appear_first)
    with pytest.raises(OutputTakenError, match="; what was there before is in ") as e:
        make(kind, out, replaces=found_at(out))
    before = Path(str(e.value).rsplit(" ", 1)[1])
    assert [content(p) for p in (out, e.value.kept, before)] == ["mine", "new", "old"]


def test_something_put_into_the_claimed_directory_stays(tmp_path, monkeypatch):
    out, rename = tmp_path / "out", Path.rename

    def put_in_first(made, path):
        if path == out:
            (out / "precious").write_text("x")
        return rename(made, path)

    monkeypatch.setattr(Path, "rename", put_in_first)
    with pytest.raises(OutputTakenError) as e:
        make("directory", out)
    assert (out / "precious").read_text() == "x" and content(e.value.kept) == "new"


def test_a_file_system_without_hard_links_is_no_worse(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "out"
    make("file", out)
    with pytest.raises(OutputTakenError) as e:
        make("file", out, "again")
    assert content(out) == "new" and content(e.value.kept) == "again"
    assert sorted(tmp_path.iterdir()) == sorted([out, e.value.kept])


@pytest.mark.parametrize("kind", KINDS)
def test_of_processes_that_make_one_output_one_wins_and_all_results_are_kept(tmp_path, kind):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_files import make
def wait():
    print("made", flush=True)
    sys.stdin.read()
make({kind!r}, Path({str(tmp_path / "out")!r}), sys.argv[1], meanwhile=wait)
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(i)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(4)
    ]  # fmt: skip
    for process in started:
        assert process.stdout.readline() == "made\n"
    for process in started:  # all are ready: now they race
        process.stdin.close()
    codes = [process.wait(240) for process in started]
    assert sorted(codes) == [0, 1, 1, 1]
    for process, code in zip(started, codes, strict=True):
        assert ("OutputTakenError" in process.stderr.read()) == (code == 1)
        process.stdout.close()
        process.stderr.close()
    assert content(tmp_path / "out") == str(codes.index(0))
    assert sorted(content(p) for p in tmp_path.iterdir()) == ["0", "1", "2", "3"]


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


def test_a_link_is_no_output(tmp_path):
    (tmp_path / "there").write_text("mine")
    for name, target in (("link", "there"), ("dangling", "nowhere")):
        link = tmp_path / name
        link.symlink_to(tmp_path / target)
        with pytest.raises(OutputError, match=f"out='{link}' is a link to '{tmp_path / target}'; name the"):
            check_new_file(link, "out", overwrite=True)
        with pytest.raises(OutputTakenError):  # one that appears during the work
            make("file", link)
        assert link.is_symlink()
    assert (tmp_path / "there").read_text() == "mine" and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a\0b", "no name holds a NUL byte"),
        ("x" * 300, "File name too long"),
        ("x" * 246, "File name too long"),
        ("\N{SNOWMAN}" * 90, "File name too long"),
        (f"{'y' * 300}/out", "File name too long"),
        ("deep/" * 900 + "out", "File name too long"),
    ],
)
def test_names_that_are_none_are_refused_before_the_work(tmp_path, name, said):
    with pytest.raises(OutputError, match=f"can't be written: .*{said}"):
        check_new_file(tmp_path / name, "out", overwrite=False)
    assert not list(tmp_path.iterdir())


def test_the_longest_names_that_are_let_through_work(tmp_path):
    for kind in KINDS:
        out = tmp_path / (kind[0] * 245)
        check_writable(out)
        make(kind, out)
        with pytest.raises(OutputTakenError) as e:
            make(kind, out, "again")
        assert content(e.value.kept) == "again"
    with sole_user(tmp_path / ("p" * 245)):
        pass


def test_a_progress_file_is_the_commands_own(tmp_path):
    file = tmp_path / "out.partial"
    for what in ("one", "two"):
        with replacing(file) as temporary:
            temporary.write_text(what)
    assert file.read_text() == "two" and list(tmp_path.iterdir()) == [file]
