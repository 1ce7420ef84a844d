"""Which files a path, a folder and a glob stand for, and what files may be like."""

import glob
import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import GATED, write_checkpoint

import pruning.sources
from pruning.errors import PruningError
from pruning.sources import read_text
from pruning.text_files import text_files


def write(folder, **files):
    """Files by name; `__` stands for `/`."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def tree(tmp_path, monkeypatch):
    names = ["a.txt", "b/a.txt", "b/c/d.txt", "b/c/x.md", "b.d/e.txt", ".h/f.txt", "b/.g.txt", "z/b/c/y.txt"]
    for name in names:
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "elsewhere" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere" / "b" / "w.txt").write_text("w")
    (tmp_path / "tree" / "linked").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "tree"


PATTERNS = [
    "**",
    "**/*",
    "**/*.txt",
    "*/*.txt",
    "b*/**/*.txt",
    "**/b/**/*.txt",
    "**/**/c/*",
    "**/c/x.md",
    "**/.*.txt",
    ".h/**",
    "**/b/../*.txt",
    "b/c/[dx].*",
    "b**/*.txt",
]


@pytest.mark.parametrize("root", ["tree/", "./tree/", "{tree}/"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_globs_match_what_pythons_own_match(tree, root, pattern):
    pattern = root.format(tree=tree) + pattern
    once: dict[str, str] = {}
    for name in sorted(str(Path(name)) for name in glob.glob(str(Path(pattern)), recursive=True)):
        if os.path.isfile(name):
            once.setdefault(os.path.realpath(name), name)
    found: dict[str, str] = {}
    for file in text_files(pattern):
        found.setdefault(os.path.realpath(file.path), str(file.path))
    assert list(found.values()) == list(once.values()) != []


def test_a_glob_may_begin_with_the_stars(tree, monkeypatch):
    monkeypatch.chdir(tree)
    assert [str(f.path) for f in text_files("**/c/*.txt")] == ["b/c/d.txt", "z/b/c/y.txt"]
    assert [str(f.path) for f in text_files("*.txt")] == ["a.txt"]


def test_loops_of_links_end_and_every_file_is_read_once(tree):
    folder = tree / "b"
    for number in range(12):  # each doubles what is found at every depth, for a glob that follows them
        (folder / f"loop{number}").symlink_to(tree)
        (folder / "c" / f"loop{number}").symlink_to(folder)
    (folder / "itself").symlink_to("itself")
    texts = {"a.txt", "b/a.txt", "b/c/d.txt", "b.d/e.txt", "z/b/c/y.txt", "w"}
    for source in ("tree/**/*.txt", f"{tree}/b/**/**/*.txt", "tree/**/b/**/c/../**/*.txt"):
        documents = read_text([source]).documents
        assert len(documents) == len(set(documents)) and set(documents) <= texts, source
    assert sorted(read_text(["tree/**/*.txt"]).documents) == sorted(texts)
    assert sorted(read_text([tree]).documents) == sorted(texts | {"b/c/x.md"})
    assert sorted(read_text([folder]).documents) == sorted(texts | {"b/c/x.md"})


def test_one_file_by_several_names_is_read_once_and_the_first_counts(tree):
    (tree / "link.txt").symlink_to("a.txt")
    os.link(tree / "a.txt", tree / "hard.txt")
    assert read_text(["tree/a.txt", tree / "a.txt", tree / "link.txt", "tree/*.txt"]).documents == ["a.txt"]
    (tree / "lines.jsonl").symlink_to("a.txt")
    assert read_text(["tree/a.txt", "tree/lines.jsonl"]).documents == ["a.txt"]
    with pytest.raises(PruningError, match=r"lines\.jsonl, line 1 is not JSON"):
        read_text(["tree/lines.jsonl"])


def test_what_leads_nowhere_or_is_no_file_is_left_out_of_folders_and_globs(tree):
    for name in ("dangling.txt", "b/dangling.txt"):
        (tree / name).symlink_to("nowhere")
    os.mkfifo(tree / "b" / "pipe.txt")
    (tree / "device.txt").symlink_to("/dev/zero")
    assert len(read_text([tree]).documents) == 7
    assert len(read_text(["tree/**/*.txt"]).documents) == 6
    for name, message in (
        ("dangling.txt", r"dangling\.txt' is not a readable UTF-8 file: .*No such file"),
        ("b/pipe.txt", r"pipe\.txt' is neither a regular file nor a folder"),
        ("device.txt", r"device\.txt' is neither a regular file nor a folder"),
        ("dangling*", r"matches no file"),
    ):
        with pytest.raises(PruningError, match=message):
            read_text([tree / name])


def test_a_file_that_goes_while_others_are_read_is_named(tree, monkeypatch):
    found = text_files(tree)
    monkeypatch.setattr("pruning.sources.text_files", lambda source: found)
    (tree / "b" / "a.txt").unlink()
    with pytest.raises(PruningError, match=r"b/a\.txt' is not a readable UTF-8 file: .*No such file"):
        read_text([tree])


def test_the_home_directory(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    assert read_text(["~/a.txt"]).documents == ["a.txt"] == read_text(["~/a.*"]).documents
    with pytest.raises(PruningError, match="~nobody-of-this-name/a.txt' is not a readable"):
        read_text(["~nobody-of-this-name/a.txt"])
    (tree.parent / "~").mkdir()
    write(tree.parent / "~", **{"a.txt": "here"})
    assert read_text(["~/a.txt"]).documents == ["here"], "what is there as it is written comes first"


def test_gzipped_files_are_read_like_others(tmp_path):
    lines = b'{"text": "d1"}\n{"text": "d2"}\n'
    for name, content in (
        ("a.txt", b"\xef\xbb\xbfone\r\ntwo"),
        ("b.jsonl", b"\xef\xbb\xbf" + lines),
        ("c.png", b"\xff"),
    ):
        (tmp_path / name).write_bytes(content)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content))
    expected = ["one\ntwo", "d1", "d2"]
    for names in ("a.txt", "b.jsonl"), ("a.txt.gz", "b.jsonl.gz"), ("a.*.gz", "*.jsonl.gz"):
        assert read_text([tmp_path / name for name in names]).documents == expected
    assert read_text([tmp_path]).documents == ["one\ntwo", "one\ntwo", "d1", "d2", "d1", "d2"]
    assert read_text([tmp_path / "b.jsonl.gz"], "text").documents == ["d1", "d2"]
    with pytest.raises(PruningError, match=r"c\.png\.gz' is not a readable UTF-8 file"):
        read_text([tmp_path / "c.png.gz"])


WHOLE = gzip.compress(b"some text, " + bytes(range(32, 127)) * 50)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (WHOLE[:-20], "ended before"),
        (WHOLE[:30] + bytes(20) + WHOLE[50:], "."),
        (WHOLE[:-8] + bytes(8), "CRC"),
    ],
)
@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz"])
def test_a_gzipped_file_that_is_broken_is_named(tmp_path, content, reason, name):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    for source in (tmp_path / name, tmp_path, tmp_path / "*.gz"):
        with pytest.raises(PruningError, match=rf"{name}' is not a readable gzip file: .*{reason}"):
            read_text([source])


@pytest.mark.parametrize("content", [b"some text", b"\x1f", gzip.compress(b"\0" * 2**24 + b"text")])
def test_what_is_no_gzipped_text_is_left_out_of_folders(tmp_path, content):
    (tmp_path / "x.txt.gz").write_bytes(content)
    (tmp_path / "good.txt").write_text("good")
    assert read_text([tmp_path]).documents == ["good"]
    with pytest.raises(PruningError, match=r"x\.txt\.gz' is not a (gzip|text) file"):
        read_text([tmp_path / "x.txt.gz"])


def test_a_gzipped_file_is_unpacked_up_to_its_first_byte_that_is_no_text(tmp_path, monkeypatch):
    unpacked = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, n=-1: unpacked.append(n) or read(self, n))
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"x" * 2**21 + b"\0" * 2**24))
    with pytest.raises(PruningError, match=f"has a NUL at character {2**21}"):
        read_text([tmp_path / "x.tar.gz"])
    assert unpacked == [2**20] * 3


def test_lines_and_characters_are_counted_over_blocks_and_kinds_of_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(pruning.sources, "_BLOCK", 3)
    (tmp_path / "a.txt").write_bytes("ä\r\nö\rü\n€".encode())
    assert read_text([tmp_path / "a.txt"]).documents == ["ä\nö\nü\n€"]
    (tmp_path / "b.txt").write_bytes("ä\r\nö\n".encode() + b"\xff")
    with pytest.raises(PruningError, match="line 3: .*0xff"):
        read_text([tmp_path / "b.txt"])
    (tmp_path / "c.txt").write_bytes("€€".encode()[:-1])
    with pytest.raises(PruningError, match="line 1: .*unexpected end of data"):
        read_text([tmp_path / "c.txt"])


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("text", encoding="utf-8-sig")
    (tmp_path / "empty.txt").write_bytes(b"\xef\xbb\xbf")
    assert read_text([tmp_path]).documents == ["text"]


def test_what_a_shell_makes_of_a_command_is_read(tmp_path):
    """Process substitution: the name of a pipe that a command writes to."""
    write_checkpoint(tmp_path / "c", GATED)
    text = " ".join(map(str, range(600)))
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress(text.encode()))
    command = Path(sys.executable).with_name("lowkey-prune")
    script = f"{command} calibrate c out.safetensors --tokens 256 --window-length 64 --text <(zcat t.txt.gz)"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out.safetensors: 256 tokens" in done.stdout


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_json_lines_stay_lines_under_another_name(tmp_path, link):
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    link(tmp_path / "x.jsonl", tmp_path / "data.txt")
    for sources in ([tmp_path], [tmp_path / "data.txt", tmp_path / "x.jsonl"], [tmp_path / "*"]):
        assert read_text(sources, "text").documents == ["one", "two"]


@pytest.mark.parametrize("name", ["x.ndjson", "X.JSONL", "x.JSONL.GZ"])
def test_json_lines_by_their_other_names(tmp_path, name):
    data = b'{"text": "one"}\n{"text": "two"}\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    assert read_text([tmp_path / name]).documents == read_text([tmp_path]).documents == ["one", "two"]


@pytest.mark.parametrize("pattern", ["**/**", "**/**/**", "**/**/*", "b/**/**", "**/c/**/**"])
def test_stars_behind_stars_find_what_glob_finds(tree, monkeypatch, pattern):
    monkeypatch.chdir(tree)
    expected = {os.path.realpath(p) for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)}
    assert {os.path.realpath(f.path) for f in text_files(pattern)} == expected
