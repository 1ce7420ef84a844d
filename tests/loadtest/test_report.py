"""The report says when, where and what was tested, in words of the server that stay words, on any screen."""

import datetime as dt
import json
import os
import re
import runpy
import shutil
import threading
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loadtest.cli import app
from loadtest.client import Result
from loadtest.facts import processor
from loadtest.figures import MIN_ROUNDS, Objectives, Slice
from loadtest.report import PAIRED, describe, finding, marked, sweep_finding, sweep_table, table
from loadtest.run import Search

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium"
)

HOSTILE = '</script><script>hacked = 1</script><img src="x" onerror="hacked=1">[red]|{{ 7 * 7 }}<b>'
MODELS = [
    {
        "id": name,
        "lowkey": {
            "source": f"source of {name}",
            "family": HOSTILE,
            "method": None,
            "d_k": [8, 64, 16],
            "state_bytes": size,
            "state_dtype": HOSTILE,
            "device": HOSTILE,
            "backend": HOSTILE,
        },
    }
    for name, size in (("dense", 841728), (HOSTILE, 430080))
]


class Impostor(BaseHTTPRequestHandler):
    """A server that is not ours, whose every word is markup."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        answers = {"/v1/models": {"data": MODELS}, "/version": {"version": HOSTILE}}
        self.answer(json.dumps(answers[self.path]), "application/json")

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        chunks = [
            *({"choices": [{"text": "a"}]} for _ in range(3)),
            {"choices": [], "usage": {"completion_tokens": 3}, "lowkey": {"state_bytes": 430080}},
        ]
        self.answer(
            "".join(f"data: {json.dumps(c)}\n\n" for c in chunks) + "data: [DONE]\n\n", "text/event-stream"
        )

    def answer(self, text, kind):
        self.send_response(200)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Folders of a run and of a sweep, named so."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Impostor)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("reports")
    url = f"http://user:secret@127.0.0.1:{server.server_port}"
    # A client that lags behind on a busy machine is no matter: every objective is kept, at every rate.
    lax = ("--url", url, "--slo-ttft", 300, "--slo-itl", 300, "--timeout", 300, "--out")
    try:
        for name, options in (
            ("run", ("--rounds", MIN_ROUNDS, "--requests", 4)),
            ("sweep", ("--start", 20, "--seconds", 1, "--steps", 2, "--max-requests", 20)),
        ):
            done = CliRunner().invoke(app, [name, *map(str, (*options, *lax, folder / name))])
            assert done.exit_code == 0, done.output
    finally:
        server.shutdown()
        server.server_close()
    return folder


def test_the_report_has_table_date_machine_models_and_settings(reports):
    page = (reports / "run" / "loadtest.html").read_text()
    text = unescape(re.sub(r"<[^>]*>", " ", page[page.index("<main>") : page.index("</main>")]))
    text = text.replace("\N{NO-BREAK SPACE}", " ")
    record = json.loads((reports / "run" / "loadtest.json").read_text())
    took = dt.datetime.now(dt.UTC) - dt.datetime.strptime(record["date"], "%Y-%m-%d %H:%M UTC").replace(
        tzinfo=dt.UTC
    )
    assert dt.timedelta(0) <= took < dt.timedelta(hours=12)
    assert record["machine"]["cpu"] == processor() and record["machine"]["cpus"] == os.cpu_count()
    for said in (record["date"], processor(), f"{os.cpu_count()} CPUs", PAIRED.split(";")[0]):
        assert said in text
    for model in MODELS:
        assert model["id"] in text and model["lowkey"]["source"] in text
        assert f"{model['lowkey']['state_bytes']:,}" in text
    assert "runtime" in text and "8 to 64" in text and f"lowkey {HOSTILE} at http://127.0.0.1" in text
    for option, value in (
        ("--rounds", MIN_ROUNDS),
        ("--requests", 4),
        ("--slo-ttft", 300.0),
        ("--warm-up", 8),
    ):
        assert re.search(rf"{option}\s+{value}\s", text), option
    for row in table(record):
        assert all(cell in text for cell in row)
    assert re.search(r"state bytes per request\s+430,080\s+430,080\s+1\.00\s", text)
    for file in (reports / "run").iterdir():
        assert "secret" not in file.read_text(), "the password of --url"


def test_the_markdown_has_it_too(reports):
    text = (reports / "run" / "loadtest.md").read_text()
    assert processor() in text and "UTC" in text and "source of dense" in text
    assert not re.search("<(?!/?[a-z]+:)", text), "no HTML of the server's"
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    assert text.count(", runtime ") == len(MODELS)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("name", "plots"), [("run", 4), ("sweep", 2)])
def test_the_page_fits_a_narrow_screen_in_light_and_dark(reports, name, plots, scheme):
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)
        wrong = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda r: None if r.url.startswith(("file:", "data:", "blob:")) else wrong.append(r.url),
        )
        page.goto((reports / name / "loadtest.html").as_uri())
        page.wait_for_selector(f"body[data-drawn='{plots}']", timeout=240_000)
        assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
        assert page.evaluate("() => typeof hacked") == "undefined"
        assert page.locator("main img, main b, main script").count() == 0
        captions = page.locator(".plots p").all_inner_texts()
        assert len(captions) == plots and all(len(caption) > 60 for caption in captions)
        assert page.locator(".lead").inner_text().count("dense") >= 1
        assert page.locator("#variants tbody th").all_inner_texts() == ["dense", HOSTILE]
        assert HOSTILE in page.locator(".figure text.legendtext").all_text_contents()
        colours = [
            page.locator(place).first.evaluate(f"e => getComputedStyle(e).{what}")
            for place, what in (("body", "backgroundColor"), ("body", "color"), (".figure text", "fill"))
        ]
        back, text, label = (sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in colours)
        assert (back > 128) == (scheme == "light") and min(abs(back - text), abs(back - label)) > 100
        browser.close()
    assert not wrong


@needs_browser
def test_the_docs_take_tables_and_pictures_from_reports(reports, tmp_path):
    root = Path(__file__).parents[2]
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    shutil.copy(root / "docs" / "loadtest.md", docs)
    script = runpy.run_path(str(root / "benchmarks" / "load_docs.py"))
    script["write"](reports, docs)
    text = (docs / "loadtest.md").read_text()
    for name in ("run", "sweep"):
        assert (reports / name / "loadtest.md").read_text() in text
        assert (docs / "images" / f"loadtest-{name}.png").stat().st_size > 5000


def rounds(count):
    """Slices in which `reduced` takes half as long, but for a round that disturbs it."""
    made = []
    for r in range(count):
        for variant, seconds in (("dense", 2.0), ("reduced", 3.0 if r == 0 else 1.0)):
            result = Result(0.0, ended=seconds, token_times=[0.5, seconds], tokens=10, state_bytes=100)
            made.append(Slice(variant, r, seconds, [result]))
    return made


def test_the_clients_lag_is_one_that_a_request_had():
    results = [Result(0.0, lag_s=lag / 100) for lag in range(1, 51)]
    described = describe([Slice("dense", 0, 1.0, results)], ["dense"], Objectives(9.0, 9.0))
    assert described["variants"]["dense"]["client_lag_p99_s"] == 0.5


def test_too_few_rounds_make_no_interval():
    for count in (1, MIN_ROUNDS - 1, MIN_ROUNDS):
        described = describe(rounds(count), ["dense", "reduced"], Objectives(9.0, 9.0))
        cells = {row[0]: row[3] for row in table(described)}
        assert cells["state bytes per request"] == "1.00"
        cell = cells["tokens/s"]
        ratio = 2 * count / (count + 2)
        if count < MIN_ROUNDS:
            assert cell == f"{ratio:.2f} (too few rounds)"
            assert finding(described) == (
                f"reduced made {ratio:.2f} times the tokens/s of dense in too few rounds to tell them apart, with "
                "1.00 of its state bytes."
            )
        else:
            low, high = map(float, re.fullmatch(rf"{ratio:.2f} \((.*) to (.*)\)", cell).groups())
            assert low < ratio < high


def test_ratios_are_marked_where_their_interval_says_better_or_worse():
    described = describe(rounds(9), ["dense", "reduced"], Objectives(9.0, 9.0))
    ratios = described["ratios"]["reduced/dense"]
    ratios["tokens_per_second"] = {"value": 1.2, "low": 1.1, "high": 1.3}
    ratios["goodput_per_second"] = {"value": 0.8, "low": 0.7, "high": 0.9}
    ratios["ttft_p50_s"] = {"value": 1.2, "low": 1.1, "high": 1.3}
    ratios["ttft_p95_s"] = {"value": 0.8, "low": 0.7, "high": 0.9}
    ratios["itl_p50_s"] = {"value": 1.2, "low": 0.9, "high": 1.3}
    ratios["itl_p95_s"] = {"value": 1.2, "low": float("nan"), "high": float("nan")}
    plain, cells = table(described), marked(described)
    assert [[getattr(cell, "text", cell) for cell in row] for row in cells] == plain
    marks = {row[0]: row[3].mark for row in cells[3:]}
    assert list(marks.items())[:6] == [
        ("tokens/s", "better"),
        ("goodput, requests/s", "worse"),
        ("TTFT median, ms", "worse"),
        ("TTFT p95, ms", "better"),
        ("TTFT p99, ms", marks["TTFT p99, ms"]),
        ("ITL median, ms", ""),
    ]
    assert marks["ITL p95, ms"] == "" and marks["state bytes per request"] == ""
    assert (
        finding(described)
        == "reduced made 1.20 (1.10 to 1.30) times the tokens/s of dense, with 1.00 of its state bytes."
    )
    ratios["tokens_per_second"] = {"value": 1.02, "low": 0.9, "high": 1.1}
    ratios["state_bytes"] = {"value": 0.5, "low": float("nan"), "high": float("nan")}
    assert finding(described) == (
        "reduced made 1.02 (0.90 to 1.10) times the tokens/s of dense, which does not tell them apart, with 0.50 of "
        "its state bytes."
    )
    assert marked(described)[-1][3].mark == "better"
    assert finding(describe(rounds(9), ["dense"], Objectives(9.0, 9.0))) == ""


def test_a_sweep_says_what_it_found():
    found = sweep_finding({"dense": Search(0, 10.0, 12.0), "reduced": Search(0, 15.0, None)})
    assert found == "Requests/s that each variant holds: dense between 10.0 and 12.0, reduced at least 15.0."


def test_the_ratio_of_two_sweeps_says_what_it_can_be():
    closed = {"dense": Search(0, 10.0, 12.0), "reduced": Search(0, 15.0, 18.0)}
    assert [row[3] for row in sweep_table(closed)] == ["ratio", "1.00", "1.50 (1.25 to 1.80)"]
    for open_end in (Search(0, 15.0, None), Search(0, 0.0, 18.0)):
        cell = sweep_table({"dense": Search(0, 10.0, 12.0), "reduced": open_end})[2][3]
        assert cell == "-" if open_end.high is None else cell == "0.00 (0.00 to 1.80)"
        assert sweep_table({"reduced": open_end, "dense": closed["dense"]})[2][3] == "-"
