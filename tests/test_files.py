"""Results under their final names: never over something that appeared meanwhile, also where it appears at the worst
moment."""

import errno
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from results import KINDS, appear, content, make

import lowkey.publishing
from lowkey.files import OutputError, OutputTakenError, check_new_file, check_writable, found_at
from lowkey.publishing import replacing, scratch_directory, sole_user, write_all
from lowkey.signals import written


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_what_appears_meanwhile_stays_and_the_result_is_kept_beside_it(tmp_path, kind, other):
    out = tmp_path / "out.x"
    with pytest.raises(OutputTakenError, match=r"out\.x has appeared or changed since .* is in ") as e:
        make(kind, out, meanwhile=lambda: appear(out, other))
    assert content(out) == "mine" and content(e.value.kept) == "new" and str(e.value.kept) in str(e.value)
    assert sorted(tmp_path.iterdir()) == sorted([out, e.value.kept])
    assert not e.value.kept.name.startswith("."), "no remains of a killed run"
    name = r"out\.[a-z0-9_]{8}\.x" if kind == "file" else r"out\.x\.[a-z0-9_]{8}"
    assert re.fullmatch(name, e.value.kept.name), "a file keeps its suffix"
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
@pytest.mark.parametrize("changed", [False, True])
def test_where_neither_the_new_nor_the_old_one_can_be_placed_both_are_named(
    tmp_path, monkeypatch, kind, changed
):
    """`changed`: what was to be replaced is not what was found, which shows only once it was put aside."""
    out = tmp_path / "out"
    make(kind, out, "old")
    found = found_at(out)
    if changed:
        looks = iter([found, None])
        monkeypatch.setattr(lowkey.publishing, "found_at", lambda path: next(looks))

    def fail(made, path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(lowkey.publishing, "_place", fail)
    with pytest.raises(OutputTakenError, match="out can't be written: Input/output error; ") as e:
        make(kind, out, replaces=found)
    assert str(e.value).endswith(
        f"; what was computed is in {e.value.kept}; what was there before is in {e.value.kept.parent / 'old'}"
    )
    assert content(e.value.kept) == "new" and content(e.value.kept.parent / "old") == "old"


def test_a_second_name_that_cannot_be_removed_does_not_matter(tmp_path, monkeypatch):
    unlink = Path.unlink

    def refuse(path, **options):
        if path.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", refuse)
    make("file", tmp_path / "out")
    assert content(tmp_path / "out") == "new" and list(tmp_path.iterdir()) == [tmp_path / "out"]


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
sys.path.insert(0, {str(Path(__file__).parent / "support")!r})
from pathlib import Path
from results import make
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


def test_of_several_results_each_is_written_and_each_that_was_kept_is_named(tmp_path):
    (tmp_path / "one").write_text("mine")
    (tmp_path / "three").write_text("mine")
    names = ("one", "two", "three")
    with pytest.raises(OutputTakenError) as e:
        write_all(*(partial(make, "file", tmp_path / name, name) for name in names))
    kept = [next(tmp_path.glob(f"{name}.*")) for name in ("one", "three")]
    assert [content(path) for path in (tmp_path / "two", *kept)] == ["two", "one", "three"]
    assert all(str(path) in str(e.value) for path in kept) and e.value.kept == kept[0]

    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        OutputError, match=r"what was computed is in .*; .*file/out can't be written: File exists"
    ):
        write_all(*(partial(make, "file", tmp_path / name) for name in ("one", "file/out")))


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


@pytest.mark.parametrize("none", [-1, 0])
def test_a_file_system_that_states_no_limit_has_none(tmp_path, monkeypatch, none):
    monkeypatch.setattr(os, "pathconf", lambda path, name: none)
    assert check_writable(tmp_path / "out") > 0


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


def test_what_is_written_to_a_scratch_directory_is_no_result(tmp_path):
    make("file", tmp_path / "out")
    before = list(written)
    with scratch_directory() as folder:
        make("file", folder / "out")
        assert written == [*before, folder / "out"]
    assert written == before and not folder.exists()
