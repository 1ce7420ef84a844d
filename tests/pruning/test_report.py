"""The report's figures against the numbers that they are drawn from, its HTML, and (slow) a browser that draws it."""

import functools
import json
import re
import subprocess
from html import escape
from html.parser import HTMLParser
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest
import torch
from checkpoints import GATED, write_checkpoint
from report_inputs import EVIL, mqar_record, table
from typer.testing import CliRunner

from modeling.checkpoint import REDUCTION
from pruning.cli import app
from pruning.evaluation import suite
from pruning.evaluation.speed import decode_speed
from pruning.report.inputs import read_inputs
from pruning.report.measured import kept_channels, ranks, spectra
from pruning.report.page import all_figures, missing, page
from pruning.report.png import BROWSERS, browser, screenshot, write_png
from pruning.report.trade import budgets, ladder, tradeoff
from pruning.views import span


def run(*args, code=0):
    result = CliRunner().invoke(app, [str(a) for a in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with one input of every kind, made by the commands themselves."""
    folder = tmp_path_factory.mktemp("made")
    dense = write_checkpoint(folder / "dense", GATED)
    text = folder / "text.txt"
    text.write_text(" ".join(f"name_{i % 6} {i * i}" for i in range(2000)))
    small = ("--text", text, "--window-length", 64)
    run("prune", dense, folder / "reduced", "--method", "drrqr", "--keep", 8, *small)
    run(
        "prune",
        dense,
        folder / "layered",
        "--method",
        "l1",
        "--keep",
        16,
        "--per-layer",
        "--align",
        16,
        *small,
    )
    (folder / "layered/recovery.json").write_text(
        json.dumps(
            {
                "format": 1,
                "control": False,
                "curve": [
                    {"step": 0, "tokens": 0, "train_loss": None, "heldout_loss": 3.0},
                    {"step": 5, "tokens": 5120, "train_loss": 2.5, "heldout_loss": 2.75},
                ],
            }
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "decode_speed", functools.partial(decode_speed, rounds=2, round_seconds=0.01))
        run(
            *("evaluate", dense, folder / "reduced", "--part", "all", "--json", folder / "e.json"),
            *("--text", text, "--window", 80, "--stride", 32, "--tokens", 512),
        )
    (folder / "table.json").write_text(json.dumps(table()))
    (folder / "mqar.json").write_text(json.dumps(mqar_record()))
    return folder


def inputs_of(made):
    names = ("table.json", "e.json", "mqar.json", "reduced.stats.safetensors", "reduced", "layered")
    return [made / name for name in names]


class Page(HTMLParser):
    """What a page holds and asks for."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.data, self.text, self._in = [], None, "", ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._in = "data" if dict(attributes).get("id") == "data" else tag

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in == "data":
            self.data = json.loads(data)
        elif self._in not in ("script", "style"):
            self.text += data


def test_the_page_holds_every_figure_and_asks_for_nothing(made, tmp_path):
    output = run("report", tmp_path / "deep/r.html", *inputs_of(made), "--title", "A <b>title</b>")
    assert "r.html: 19 figures" in output
    html = (tmp_path / "deep/r.html").read_text()
    found = Page(html)
    for tag, attributes in found.tags:
        assert tag in {"html", "head", "meta", "title", "style", "body", "main", "section", "h1", "h2", "p", "div"} | {
            "table", "thead", "tbody", "tr", "th", "td", "br", "ul", "li", "script"
        }  # fmt: skip
        assert not {"src", "href"} & set(attributes)
    policy = next(a["content"] for _, a in found.tags if "http-equiv" in a)
    assert "default-src 'none'" in policy and "http" not in policy
    style = html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    divs = [a["id"] for tag, a in found.tags if tag == "div" and a.get("class") == "figure"]
    assert divs == [figure["name"] for figure in found.data]
    assert len(set(divs)) == 19
    assert "A <b>title</b>" in found.text
    assert "Not in this report" not in found.text
    measured = json.loads((made / "e.json").read_text())
    for entry in measured["checkpoints"]:
        assert f"{entry['perplexity']['perplexity']:.3f}" in found.text
        assert entry["sha256"] in found.text
    assert f"{measured['checkpoints'][1]['divergence']['kl']:.4f}" in found.text
    for bits in (bits for entry in measured["checkpoints"] for bits in entry["bits"]):
        assert f"{bits['state_bytes']:,}" in found.text
        assert f"{bits['perplexity']['perplexity']:.3f}" in found.text


def test_cells_are_marked_where_they_are_better_or_worse(made):
    inputs = read_inputs(inputs_of(made))
    marks = re.findall(r'<td class="(better|worse)">[▲▼] ([^<]*)', page("Test", inputs, []))
    dense, reduced = json.loads((made / "e.json").read_text())["checkpoints"]
    size, before, after = reduced["state_bytes"], *(e["perplexity"]["perplexity"] for e in (dense, reduced))
    assert ("better", f"{size:,} ({100 * (size / dense['state_bytes'] - 1):+.1f} %)") in marks
    said = f"{after:.3f} ({100 * (after / before - 1):+.1f} %)"
    assert (("worse" if after > before else "better"), said) in marks
    for bits in reduced["bits"][1:]:
        rise = bits["loss_rise"]
        shown = [mark for mark, text in marks if text.startswith(f"{bits['perplexity']['perplexity']:.3f} (")]
        sure = abs(rise["mean"]) > 2 * rise["standard_error"]
        assert bool(shown) == sure and (not sure or shown[0] == ("worse" if rise["mean"] > 0 else "better"))
    assert [text for mark, text in marks if mark == "better"][:2] == ["11.00"] * 2, "the best of each width"
    assert ("better", "3.000 =&gt; 2.750") in marks


def test_given_checkpoints_are_in_a_table_per_layer_and_recovered_ones_too(made):
    text = Page(page("Test", read_inputs(inputs_of(made)), [])).text
    rows = text[text.index("Reduced checkpoints") : text.index("Recall of a model")].splitlines()
    reduced, layered = (
        next(row for row in rows if row.startswith(str(made / name))) for name in ("reduced", "layered")
    )
    assert "drrqr, seed 0" in reduced and "32 => 8" in reduced and "per layer" not in reduced
    record = json.loads((made / "layered" / REDUCTION).read_text())
    assert f"32 => {span(record['d_k'])}, chosen per layer" in layered
    assert f"{record['state_bytes']:,}" in layered and "5,120 tokens" in layered


def test_names_from_files_stay_text(made, tmp_path):
    title = "%SCRIPT% %FIGURES% %TITLE%"
    run("report", tmp_path / "r.html", made / "table.json", "--title", title)
    html = (tmp_path / "r.html").read_text()
    found = Page(html)
    assert EVIL in found.text
    assert title in found.text
    assert "img" not in [tag for tag, _ in found.tags]
    labels = [trace["name"] for trace in found.data[0]["data"]]
    assert labels == ["l1", "&lt;img src=http://x.example/&gt;&amp;&lt;/script&gt;", "l1, per layer"]


def test_what_is_missing_is_left_out_and_said(made, tmp_path):
    output = run("report", tmp_path / "r.html", made / "reduced")
    assert "r.html: 1 figure, " in output
    text = Page((tmp_path / "r.html").read_text()).text
    assert "Not in this report" in text
    for what in (
        *("perplexity and KL against width", "error budget", "bytes against quality", "recall", "spectra"),
        *("recovery curves", "identifiers that occurred before"),
    ):
        assert what in text
    assert "kept channels (give" not in text
    inputs = read_inputs(inputs_of(made))
    assert missing(inputs, all_figures(inputs)) == []


def test_methods_are_drawn_as_the_means_and_ranges_of_their_seeds(made):
    perplexity, methods, kl = tradeoff("t", read_inputs([made / "table.json"]).tables[0][1], 0)
    l1, _, layered = perplexity.figure.data
    assert list(l1.x) == [8, 16] and list(l1.y) == pytest.approx([25.0, 25.0])  # 12 and 13 against 10
    assert list(l1.error_y.array) == pytest.approx([5.0, 5.0])
    assert list(l1.error_y.arrayminus) == pytest.approx([5.0, 5.0])
    assert (l1.line.dash, layered.line.dash) == ("solid", "dash")
    assert l1.line.color == layered.line.color
    assert list(kl.figure.data[0].y) == pytest.approx([0.025, 0.025])
    assert [trace.x[0] for trace in methods.figure.data] == pytest.approx([25.0, 15.0, 10.0] * 2)


def test_a_reduction_that_costs_nothing_is_drawn_too(made, tmp_path):
    record = table()
    record["reduced"][0]["perplexity"] = 9.0
    (tmp_path / "t.json").write_text(json.dumps(record))
    perplexity, _, kl = tradeoff("t", read_inputs([tmp_path / "t.json"]).tables[0][1], 0)
    assert (perplexity.figure.layout.yaxis.type, kl.figure.layout.yaxis.type) == ("linear", "log")


def test_a_sweep_that_has_measured_the_dense_model_alone_is_no_error(tmp_path):
    (tmp_path / "t.json.partial").write_text(json.dumps(table(reduced=[], curves=[])))
    inputs = read_inputs([tmp_path / "t.json.partial"] * 2)
    assert all_figures(inputs) == []
    page("Test", inputs, [])


def test_models_are_drawn_against_each_other_where_they_share_a_row(made):
    (_, first), *_ = read_inputs([made / "table.json"]).tables
    changed = table(checkpoint="larger", dense={**table()["dense"], "perplexity": 11.0})
    second = msgspec.json.decode(json.dumps(changed), type=type(first))
    second.reduced[:] = [cell for cell in second.reduced if cell.row == "l1, per layer"]
    (figure,) = ladder([("a.json", first), ("b.json", second)])
    a, b = figure.figure.data
    assert figure.figure.layout.annotations[0].text == "l1, per layer"
    assert [trace.name for trace in (a, b)] == [f"{escape(EVIL)} (10.00)", "larger (11.00)"]
    assert list(a.x) == list(b.x) == [8, 16] and list(a.y) == pytest.approx([10.0, 10.0])
    assert list(b.y) == pytest.approx([0.0, 0.0])  # 10.5 and 11.5 against 11
    assert list(b.error_y.array) == pytest.approx([100 * 0.5 / 11] * 2)
    assert ladder([("a.json", first)]) == []


def test_rank_is_drawn_by_layer_and_by_head(made):
    ((name, evaluation),) = read_inputs([made / "e.json"]).evaluations
    by_layer, by_head = ranks(name, evaluation, 0)
    measured = evaluation.checkpoints[0].rank
    *layers, mean = by_layer.figure.data[: len(measured.utilisation) + 1]
    expected = 100 * np.array(measured.utilisation)
    assert [list(trace.y) for trace in layers] == [pytest.approx(list(y)) for y in expected.mean(-1)]
    assert list(mean.y) == pytest.approx(list(expected.mean((0, 2))))
    rows = np.array(by_head.figure.data[0].customdata)
    assert rows == pytest.approx(expected.swapaxes(1, 2).reshape(-1, len(measured.positions)), abs=1e-3)


def test_budgets_show_the_curves_and_what_they_bought(made):
    inputs = read_inputs(inputs_of(made))
    of_table, of_checkpoint = budgets(inputs.tables, inputs.reductions)
    first, second, *chosen = of_table.figure.data
    assert list(first.y) == pytest.approx([0.3, 0.15, 0.0]) and second.y[0] == pytest.approx(0.6)
    assert [(c.name, list(c.y)) for c in chosen] == [
        ("budget of d_k 8", [4.0, 12.0]),
        ("budget of d_k 16", [12.0, 20.0]),
    ]
    record = json.loads((made / "layered" / REDUCTION).read_text())
    *curves, marks, widths = of_checkpoint.figure.data
    assert [list(c.y) for c in curves] == [list(r.values()) for r in record["budget"]["loss_rise"]]
    assert list(widths.y) == record["d_k"]
    assert list(marks.y) == [
        rise[str(n)] for rise, n in zip(record["budget"]["loss_rise"], record["d_k"], strict=True)
    ]


def test_kept_channels_are_those_of_the_record(made):
    (_, reduction), _ = read_inputs([made / "reduced", made / "layered"]).reductions
    (figure,) = kept_channels([("reduced", reduction)])
    z = np.array(figure.figure.data[0].z)
    assert z.shape == (3 * 2, 32)
    assert [np.flatnonzero(row).tolist() for row in z] == [
        kept for layer in reduction.kept_channels for kept in layer
    ]


def test_spectra_are_the_eigenvalues_of_the_grams():
    generator = np.random.default_rng(0)
    turn = np.linalg.qr(generator.normal(size=(4, 4)))[0]

    def gram(*values):
        return torch.from_numpy((turn * np.array(values)) @ turn.T)[None]

    layer = {"q_normalised": gram(1.0, 100.0, 10.0, 0.0), "k_normalised": gram(2.0, 2.0, 2.0, 2.0)}
    by_layer, by_head = spectra("s", SimpleNamespace(layers={0: layer}, tokens=8), 0)
    queries, keys = by_layer.figure.data
    assert queries.y == pytest.approx([1.0, 0.1, 0.01, 1e-10], rel=1e-6)
    assert keys.y == pytest.approx([1.0] * 4)
    assert by_head.figure.data[0].z[0] == pytest.approx([0, -1, -2, -10], abs=1e-3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "in.json can't be read for a report"),
        (
            "{}",
            "in.json is neither of evaluate --json nor of sweep or benchmarks/ladder/mqar.py: its kind is None",
        ),
        (json.dumps(table(format=7)), "in.json has format 7; this version reads 1"),
        (json.dumps(table(dense={})), "missing required field"),
        (json.dumps(table(reduced=[{"row": 3}])), "Expected `str`, got `int` - at `$.reduced[0].row`"),
        ('{"kind": "evaluation"}', "missing required field"),
        ('{"kind": "mqar"}', "missing required field"),
        (json.dumps(mqar_record(format=7)), "is 'mqar' of format 7; this version reads 'mqar' of format 1"),
    ],
)
def test_other_inputs_are_refused_by_name(tmp_path, content, message):
    (tmp_path / "in.json").write_text(content)
    assert message in run("report", tmp_path / "r.html", tmp_path / "in.json", code=2).replace("\n", "")
    assert [p.name for p in tmp_path.iterdir()] == ["in.json"]


def test_folders_and_missing_files_are_refused(made, tmp_path):
    assert "holds neither state_reduction.json nor recovery.json" in run(
        "report", tmp_path / "r.html", made / "dense", code=2
    )
    assert "can't be read" in run("report", tmp_path / "r.html", tmp_path / "no.json", code=2)
    assert "is not a statistics file" in run(
        "report", tmp_path / "r.html", tmp_path / "no.safetensors", code=2
    )
    (tmp_path / "r.html").write_text("mine")
    assert "already exists" in run("report", tmp_path / "r.html", made / "table.json", code=2)
    run("report", tmp_path / "r.html", made / "table.json", "--overwrite")


def test_pictures_without_a_browser_are_refused_before_anything_is_written(made, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "--png needs a Chromium browser" in run(
        "report", tmp_path / "r.html", made / "table.json", "--png", tmp_path / "p", code=2
    )
    assert not list(tmp_path.iterdir())


def has_browser():
    try:
        return bool(browser())
    except Exception:
        return False


OVERLAPS = """() => [...document.querySelectorAll('.figure')].flatMap(figure => {
  const texts = '.annotation-text, .xtitle, .ytitle, .xtick text, .ytick text, .legendtext';
  const boxes = [...figure.querySelectorAll(texts)]
    .map(e => [e.textContent, e.getBoundingClientRect()]).filter(([, box]) => box.width);
  return boxes.flatMap(([text, a], i) => boxes.slice(i + 1)
    .filter(([, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
    .map(([other]) => `${figure.id}: ${text} | ${other}`));
})"""
"""Texts of figures that lie over each other, by more than the room that letters leave around them."""


@pytest.mark.skipif(not has_browser(), reason=f"none of {', '.join(BROWSERS)} is on PATH")
def test_on_a_narrow_screen_no_texts_of_a_figure_overlap(made, tmp_path):
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
    )
    inputs = read_inputs(inputs_of(made))
    drawn = all_figures(inputs)
    (tmp_path / "r.html").write_text(page("Test", inputs, drawn))
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        screen = chromium.new_page(viewport={"width": 360, "height": 740})
        screen.set_default_timeout(240_000)
        screen.goto((tmp_path / "r.html").as_uri())
        screen.wait_for_selector(f"body[data-drawn='{len(drawn)}']")
        assert screen.evaluate("() => document.documentElement.scrollWidth") <= 360
        assert screen.evaluate(OVERLAPS) == []
        chromium.close()


@pytest.mark.slow
@pytest.mark.skipif(not has_browser(), reason=f"none of {', '.join(BROWSERS)} is on PATH")
def test_a_browser_draws_every_figure_without_complaint(made, tmp_path):
    inputs = read_inputs(inputs_of(made))
    drawn = all_figures(inputs)
    html = page("Test", inputs, drawn)
    # What the page measures of itself, once it is drawn.
    measure = "document.body.dataset.width = document.documentElement.scrollWidth"
    probe = f"<script>setTimeout(() => {measure}, 5000)</script>"
    (tmp_path / "r.html").write_text(html.replace("</body>", f"{probe}</body>"))
    for dark in (False, True):
        said = screenshot(tmp_path / "r.html", tmp_path / f"{dark}.png", 800, 1200, dark=dark)
        assert "CONSOLE" not in said, said
        assert (tmp_path / f"{dark}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "True.png").read_bytes() != (tmp_path / "False.png").read_bytes()
    dom = subprocess.run(
        [
            *(browser(), "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=800,1200", "--dump-dom"),
            (tmp_path / "r.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    ).stdout
    body = dict(next(a for tag, a in Page(dom).tags if tag == "body"))
    assert body["data-drawn"] == str(len(drawn))
    assert int(body["data-width"]) <= 800
    write_png(drawn[0], tmp_path / "one.png", width=600)
    header = (tmp_path / "one.png").read_bytes()[16:24]
    assert (int.from_bytes(header[:4]), int.from_bytes(header[4:])) == (
        1200,
        2 * drawn[0].figure.layout.height,
    )
