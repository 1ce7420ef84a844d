"""`lowkey-loadtest` against a real server: paired figures, a bounded sweep, and no load on other people's machines."""

import json
import random
import signal
import tempfile

import pytest
from live_server import LiveServer, write_variants
from typer.testing import CliRunner

import loadtest.cli
import lowkey.publishing
from loadtest.cli import app
from loadtest.workload import Lengths, WorkloadError, read_trace


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loadtest")
    paths = write_variants(folder)
    server = LiveServer(folder / "log", *(f"{name}={path}" for name, path in paths.items()))
    server.wait_ready()
    yield server
    server.stop()


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


SMALL = ("--prompt-tokens", "4-40", "--output-tokens", "2-8", "--warm-up", 2)


@pytest.mark.parametrize("loop", [("--concurrency", 4), ("--rate", 40)])
def test_both_variants_get_the_same_requests(server, tmp_path, loop):
    result = run("run", "--url", server.url, *loop, "--rounds", 2, "--requests", 8, *SMALL, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "loadtest.json").read_text())
    text = json.dumps(record)
    assert '"dense"' in text and '"reduced"' in text
    for name in ("dense", "reduced"):
        made = server.sample(
            "lowkey_requests_total", variant=name, endpoint="completions", finish_reason="length"
        )
        assert made and made % 2 == 0
    page = (tmp_path / "loadtest.html").read_text()
    assert "<script" in page and 'src="http' not in page
    table = (tmp_path / "loadtest.md").read_text()
    assert "errors | 0 | 0" in table.replace("  ", " ")


def test_a_sweep_ends(server, tmp_path):
    small = SMALL[:4]
    limits = ("--start", 5, "--seconds", 1, "--steps", 2, "--max-requests", 30)
    result = run("sweep", "--url", server.url, *limits, *small, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert list(tmp_path.glob("*.json"))


def test_a_directory_that_takes_no_file_is_found_out_before_any_load(server, tmp_path):
    (tmp_path / "file").write_text("a file")
    before = server.sample(
        "lowkey_requests_total", variant="dense", endpoint="completions", finish_reason="length"
    )
    for command, out in (
        ("run", tmp_path / "file" / "out"),
        ("sweep", "/proc/lowkey"),
        ("run", tmp_path / "file"),
    ):
        result = run(command, "--url", server.url, *SMALL[:4], "--out", out)
        assert result.exit_code == 2 and "Invalid value: --out" in result.output, result.output
    made = server.sample(
        "lowkey_requests_total", variant="dense", endpoint="completions", finish_reason="length"
    )
    assert made == before


def test_what_was_measured_is_kept_when_the_directory_is_lost_meanwhile(server, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    real = loadtest.cli.paired

    async def measure_and_lose(*args):
        slices = await real(*args)
        out.write_text("no directory")
        return slices

    monkeypatch.setattr(loadtest.cli, "paired", measure_and_lose)
    result = run("run", "--url", server.url, "--rounds", 2, "--requests", 4, *SMALL, "--out", out)
    (kept,) = tmp_path.glob("lowkey-*/out")
    last = result.output.splitlines()[-1]
    assert result.exit_code == 2 and last.endswith(f"; what was computed is in {kept}")
    assert "tokens/s" in result.output, "the table is shown all the same"
    assert json.loads((kept / "loadtest.json").read_text())["requests"]
    assert {p.name for p in kept.iterdir()} == {"loadtest.json", "loadtest.md", "loadtest.html"}


def at_the_end_of_the_load(monkeypatch, do):
    real = loadtest.cli.paired

    async def paired(*arguments):
        slices = await real(*arguments)
        do()
        return slices

    monkeypatch.setattr(loadtest.cli, "paired", paired)


FEW = ("--rounds", 1, "--requests", 2, "--warm-up", 1, *SMALL[:4])


def test_a_report_replaces_the_one_before_and_nothing_that_appeared_meanwhile(server, tmp_path, monkeypatch):
    arguments = ("run", "--url", server.url, *FEW, "--out", tmp_path / "out")
    assert run(*arguments).exit_code == 0
    before = (tmp_path / "out" / "loadtest.json").read_text()
    assert run(*arguments).exit_code == 0
    assert (tmp_path / "out" / "loadtest.json").read_text() != before
    at_the_end_of_the_load(monkeypatch, lambda: (tmp_path / "out" / "loadtest.md").write_text("mine"))
    result = run(*arguments)
    assert result.exit_code == 2 and "loadtest.md has appeared or changed since" in result.output
    assert (tmp_path / "out" / "loadtest.md").read_text() == "mine"
    (kept,) = (tmp_path / "out").glob("loadtest.*.md")
    assert kept.name in result.output.replace("\n", "") and "errors" in kept.read_text()
    assert len(list((tmp_path / "out").iterdir())) == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_one_line_and_leaves_nothing(server, tmp_path, monkeypatch, number):
    at_the_end_of_the_load(monkeypatch, lambda: signal.raise_signal(number))
    result = run("run", "--url", server.url, *FEW, "--out", tmp_path / "out")
    assert result.exit_code == 128 + number and result.output.endswith("interrupted: nothing was written\n")
    monkeypatch.undo()
    monkeypatch.setattr(loadtest.report, "page", lambda *_: signal.raise_signal(number))
    result = run("run", "--url", server.url, *FEW, "--out", tmp_path / "out")
    assert result.exit_code == 128 + number and not (tmp_path / "out").exists()


def test_a_signal_after_the_first_file_names_what_is_written(server, tmp_path, monkeypatch):
    out, place = tmp_path / "out", lowkey.publishing._place

    def interrupted(made, path):
        if path.name == "loadtest.md":
            signal.raise_signal(signal.SIGTERM)
        place(made, path)

    monkeypatch.setattr(lowkey.publishing, "_place", interrupted)
    result = run("run", "--url", server.url, *FEW, "--out", out)
    assert result.exit_code == 143
    said = f"interrupted: {out / 'loadtest.json'} and {out / 'loadtest.md'} are written\n"
    assert result.output.endswith(said) and len(list(out.iterdir())) == 2


def test_other_machines_are_not_loaded():
    result = run("run", "--url", "http://example.com")
    assert result.exit_code == 2 and "not this machine" in " ".join(result.output.replace("│", " ").split())


def test_nobody_there():
    assert run("run", "--url", "http://127.0.0.1:9").exit_code == 2


def test_lengths():
    draw = random.Random(0)
    drawn = [Lengths("lognormal:100,0.5,300").draw(draw) for _ in range(2000)]
    assert max(drawn) == 300 and 90 < sorted(drawn)[1000] < 110
    assert {Lengths("3-5").draw(draw) for _ in range(100)} == {3, 4, 5}
    for bad in ("", "0", "5-3", "x", "lognormal:1,2"):
        with pytest.raises(WorkloadError):
            Lengths(bad)


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a\\ud800", "max_tokens": 1}',
        '{"prompt": "a", "max_tokens": %s}' % ("9" * 5000),
        "[" * 100_000,
    ],
    ids=["surrogate", "digits", "brackets"],
)
def test_a_line_of_a_trace_that_no_parser_likes_is_named(tmp_path, line):
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"prompt": "a", "max_tokens": 1}\n' + line)
    with pytest.raises(WorkloadError, match=r"trace\.jsonl:2: "):
        read_trace(trace, 257, 0)
