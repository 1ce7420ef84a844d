"""Inputs that are no files of lowkey-prune, and names that no file can have: one line from every command."""

import os
import shutil
import struct

import pytest
import torch
from pruning_runs import RECOVER, TEXT, invoke, make_inputs
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("broken"))


def refused(tmp_path, *arguments):
    """The one line of the error; nothing has changed."""
    before = sorted(tmp_path.rglob("*"))
    result = invoke(*arguments)
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit), repr(result.exception)
    *_, last = result.stderr.splitlines()
    assert last.startswith("error: ") and "Traceback" not in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    return last


def metadata(**fields):
    return lambda file, _: save_file({"a": torch.zeros(1)}, file, fields)


def whole_bytes(change):
    return lambda file, statistics: file.write_bytes(change(statistics.read_bytes()))


BROKEN = {
    "truncated": whole_bytes(lambda b: b[:-100]),
    "cut in the header": whole_bytes(lambda b: b[:40]),
    "header too large": whole_bytes(lambda b: struct.pack("<Q", 2**62) + b[8:]),
    "large header": whole_bytes(lambda b: struct.pack("<Q", 2 * 10**8) + b[8:]),
    "empty": whole_bytes(lambda b: b""),
    "no safetensors": whole_bytes(lambda b: b"\xff" * 1000),
    "no metadata": lambda file, _: save_file({"a": torch.zeros(1)}, file),
    "a directory": lambda file, _: file.mkdir(),
    "lists": metadata(lowkey_statistics="[]", fingerprint="[]", progress="[]"),
    "nothing": metadata(lowkey_statistics="null", fingerprint="null", progress="null"),
    "no keys": metadata(lowkey_statistics="{}", fingerprint="{}", progress="{}"),
    "deep": metadata(lowkey_statistics="[" * 10**5, fingerprint="[" * 10**5, progress="{}"),
    "long": metadata(lowkey_statistics="9" * 5000, fingerprint="9" * 5000, progress="1"),
    "odd names": metadata(lowkey_statistics='{"format": 3, "names": [[]]}', fingerprint="{}", progress='{"step": []}'),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("command", ["merge", "prune", "report", "calibrate", "recover"])
def test_what_is_no_statistics_or_progress_file_is_one_line(made, tmp_path, command, how):
    name = {"calibrate": "out.partial", "recover": "out.progress.safetensors"}.get(command, "given")
    BROKEN[how](tmp_path / name, made / "s.safetensors")
    given, out = tmp_path / name, tmp_path / "out"
    dense, text, heldout = made / "dense", ("--text", made / "text"), ("--heldout", made / "text")
    arguments = {
        "merge": ("merge", given, "--out", out),
        "prune": ("prune", dense, out, "--method", "drrqr", "--keep", 8, "--stats", given),
        "report": ("report", out, given),
        "calibrate": ("calibrate", dense, out, *text, *TEXT),
        "recover": ("recover", dense, made / "reduced", out, *text, *heldout, *RECOVER),
    }[command]
    assert str(given) in refused(tmp_path, *arguments)


@pytest.mark.parametrize(
    "source", ["x" * 300, "dangling", "file/x/y", "loop", "~nobody-of-this-name/x/y", "y/" * 3000]
)
def test_sources_that_cannot_be_are_one_line(made, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    shutil.copy(made / "s.safetensors", "s.safetensors")
    for arguments in (
        ("inspect", source),
        ("calibrate", source, "out"),
        ("prune", source, "out", "--method", "l1", "--keep", 8),
        ("evaluate", source),
        ("evaluate", made / "dense", source),
        ("recover", source, made / "reduced", "out"),
        ("recover", made / "dense", source, "out"),
        ("merge", "s.safetensors", source, "--out", "out"),
        ("report", "out", source),
    ):
        assert source.strip("/") in refused(tmp_path, *arguments)


PLACES = ("dangling", "link to a file", "link to a folder")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", ["calibrate", "merge", "prune", "stats", "recover", "evaluate", "report"])
def test_a_link_is_no_output_and_what_it_leads_to_stays(made, tmp_path, command, place):
    (tmp_path / "file").write_text("mine")
    shutil.copytree(made / "reduced", tmp_path / "folder")
    out = tmp_path / "out"
    out.symlink_to({"dangling": "nowhere", "link to a file": "file", "link to a folder": "folder"}[place])
    dense, text = made / "dense", ("--text", made / "text")
    drrqr = ("--method", "drrqr", "--keep", 8, *text, *TEXT)
    arguments = {
        "calibrate": ("calibrate", dense, out, *text, *TEXT),
        "merge": ("merge", made / "s.safetensors", "--out", out),
        "prune": ("prune", dense, out, "--method", "l1", "--keep", 8),
        "stats": ("prune", dense, tmp_path / "new", *drrqr),
        "recover": ("recover", dense, made / "reduced", out, *text),
        "evaluate": ("evaluate", dense, *text, "--json", out),
        "report": ("report", out, made / "reduced"),
    }[command]
    if command == "stats":
        out = out.rename(tmp_path / "new.stats.safetensors")
    assert f"={str(out)!r} is a link to " in refused(tmp_path, *arguments, "--overwrite")
    assert (tmp_path / "file").read_text() == "mine" and out.is_symlink()


def test_names_that_are_not_utf_8_are_refused_before_the_work(made, tmp_path):
    """Which safetensors can't open; a terminal in another encoding, or an old archive, makes them."""
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    arguments = ("prune", made / "dense", odd, "--method", "l1", "--keep", 8)
    assert refused(tmp_path, *arguments).endswith("can't be written: its name is not UTF-8")
    shutil.copytree(made / "dense", odd)
    assert refused(tmp_path, "inspect", odd).endswith(": safetensors reads only names that are UTF-8")


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_directory_in_the_place_of_progress_is_named(made, tmp_path, overwrite):
    (tmp_path / "s.safetensors.partial").mkdir()
    last = refused(tmp_path, "calibrate", made / "dense", tmp_path / "s.safetensors", *TEXT, *overwrite)
    assert last.endswith("s.safetensors.partial is a directory, not a statistics file of lowkey-prune")
