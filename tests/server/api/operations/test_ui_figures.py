"""Figures and charts of the compare tab in a real Chromium: speed, its interval and its curve, and the scale of KL."""

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
from browser import CHROMIUM
from compare_page import RATIOS, answer_with, card, evaluate, figure, fill, history, press, run, start
from playwright.sync_api import expect

from server.hub import window as ab

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


def interval(ratios):
    """Geometric mean and 95 % t interval, by scipy."""
    logs = np.log(ratios)
    low, high = stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs))
    return np.exp([logs.mean(), low, high])


def test_speed_over_time_is_the_slope_of_tokens(open_page):
    """Against numpy's interpolation; the chart is drawn from it with axes from zero that all cards share."""
    page = open_page()
    seconds = np.cumsum([0.05, *np.random.default_rng(0).uniform(0.001, 0.02, 40)])
    tokens = np.arange(1, 42)
    curve = np.array(evaluate(page, "speed.js", "m.speedCurve(args[0])", np.c_[seconds, tokens].tolist()))
    half = (seconds[-1] - seconds[0]) / 12
    begin, end = (np.clip(curve[:, 0] + d, seconds[0], seconds[-1]) for d in (-half, half))
    slope = (np.interp(end, seconds, tokens) - np.interp(begin, seconds, tokens)) / (end - begin)
    assert curve[[0, -1], 0] == pytest.approx(seconds[[0, -1]])
    assert curve[:, 1] == pytest.approx(slope)
    steady = evaluate(page, "speed.js", "m.speedCurve(args[0])", [[0.5 + i / 100, i + 1] for i in range(20)])
    assert [value for _, value in steady] == pytest.approx([100] * len(steady))
    assert evaluate(page, "speed.js", "m.speedCurve(args[0])", [[0.1, 1], [0.2, 2], [0.3, 3]]) == []
    ends = [evaluate(page, "speed.js", "m.niceEnd(args[0])", value) for value in (0, 99, 100, 101, 240, 0.3)]
    assert ends == pytest.approx([1, 100, 100, 200, 250, 0.5])


def test_faster_is_drawn_higher_and_ends_earlier(open_page):
    page = open_page()
    draw = """[200, 100].map((speed) => {
        const curve = m.svg("svg");
        m.drawSpeed(curve, [[0.1, speed], [0.1 + 100 / speed, speed]], { seconds: 1.1, speed: 200 });
        const ticks = [...curve.querySelectorAll(".tick")].map((tick) => tick.textContent);
        return [curve.querySelector(".line").getAttribute("points"), ticks];
    })"""
    (fast, ticks), (slow, same) = evaluate(page, "charts.js", draw)
    assert ticks == same == ["0", "100", "200", "0 s", "1.10 s"]
    (fast_begin, fast_end), (slow_begin, slow_end) = (
        [tuple(map(float, point.split(","))) for point in points.split()] for points in (fast, slow)
    )
    assert fast_begin[0] == slow_begin[0] and fast_end[0] < slow_end[0]
    assert fast_end[1] < slow_end[1], "y grows downwards"


def test_the_legend_of_kl_has_the_ticks_of_its_scale(open_page):
    page = open_page()
    edges = evaluate(page, "charts.js", "m.HEAT_EDGES")
    assert np.diff(np.log10(edges)) == pytest.approx(0.5), (
        "logarithmic: each edge is the same factor from the next"
    )
    for i, edge in enumerate(edges):
        below, at = (evaluate(page, "charts.js", "m.heat(args[0])", edge * by) for by in (0.999, 1))
        assert (below, at) == (i, i + 1)
    legend = page.locator(".legend").first
    expect(legend).to_be_visible()
    ticks = {
        float(tick.text_content()): float(tick.get_attribute("x")) for tick in legend.locator("text").all()
    }
    assert list(ticks) == [0.001, 0.01, 0.1, 1]
    shades = legend.locator("rect").all()
    assert [shade.get_attribute("class") for shade in shades] == [f"heat-{i}" for i in range(len(edges) + 1)]
    for value, x in ticks.items():
        shade = shades[evaluate(page, "charts.js", "m.heat(args[0])", value)]
        assert x == pytest.approx(float(shade.get_attribute("x")), abs=1), (
            "a tick stands where its shade begins"
        )


@pytest.mark.parametrize("runs", [5, 6, 11, 61])
def test_the_interval_is_students_over_logarithms(open_page, runs):
    page = open_page()
    ratios = np.resize(RATIOS, runs).tolist()
    found = evaluate(page, "timing.js", "m.estimate(args[0])", ratios)
    # The quantile is that of an expansion: a thousandth of it is below what the page shows.
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(interval(ratios), rel=1e-3)
    assert found["mean"] == pytest.approx(ab._estimate_ratio(np.array(ratios))["mean"], rel=1e-12)
    few = evaluate(page, "timing.js", "m.estimate(args[0])", ratios[:4])
    assert few["low"] is None and few["high"] is None and few["runs"] == 4


def test_speed_has_an_interval_once_it_was_timed_often_enough(open_page):
    page = open_page()
    sent = answer_with(page, RATIOS)
    value, basis = figure(page, "Tokens/s")
    fill(page)
    run(page)
    expect(value).to_have_text("not enough data")
    expect(basis).to_have_text("timed runs: 1 of at least 5")
    expect(history(page).first).to_contain_text("not enough data")
    expect(card(page, "dense").locator(".basis")).to_contain_text("one timed run")
    expect(card(page, "dense").locator(".interval")).to_have_text("")
    expect(page.locator("#repeat-note")).not_to_contain_text("Brackets")
    for repeats, runs in enumerate((6, 11), 1):
        press(page, "Repeat 5 times")
        expect(basis).to_contain_text(f"{runs} runs")
        mean, low, high = interval(RATIOS[:runs])
        expect(value).to_have_text(f"{mean:.2f}\u00d7")
        rests_on = f"[{low:.2f}, {high:.2f}], {runs} runs"
        assert low < 1 < high
        expect(basis).to_have_text(f"{rests_on}: no difference shown")
        expect(history(page).first).to_contain_text(rests_on)
        expect(page.locator("#repeat-note")).to_contain_text("Brackets hold the 95 % interval.")
        expect(card(page, "dense").locator(".basis")).to_contain_text(f"{runs} timed runs")
        # All runs were told to have the same speed.
        expect(card(page, "dense").locator(".interval")).to_have_text("[100, 100]")
        assert len(sent) == 2 + 5 * repeats and all(body == sent[1] for body in sent[2:])


@pytest.mark.parametrize(("ratio", "even"), [(1.2, False), (1.0, True), (0.8, False)])
def test_an_interval_that_holds_1_shows_no_difference(open_page, ratio, even):
    page = open_page()
    runs = [{"reduced": {"ratio": ratio * by}} for by in (0.98, 0.99, 1.0, 1.01, 1.02)]
    found = evaluate(page, "timing.js", "m.speedRatio(args[0], 'reduced')", runs)
    assert found["known"] and found["even"] is even


def test_answers_too_short_to_time_say_so(open_page):
    page = open_page()
    answer_with(page, [None] * 6, speeds=(None, None))
    value, _ = figure(page, "Tokens/s")
    fill(page, max_tokens=5)
    start(page)
    expect(page.locator("#repeat-note")).to_contain_text("Timed once")
    press(page, "Repeat 5 times")
    expect(page.locator("#repeat-note")).to_contain_text("Timed 6 times")
    expect(value).to_have_text("too short to time")
    expect(history(page).first).to_contain_text("too short to time")
    expect(page.locator("#repeat-note")).not_to_contain_text("Brackets")
    for variant in ("dense", "reduced"):
        expect(card(page, variant).locator(".figures .value").first).to_have_text("\u2013")
        expect(card(page, variant).locator(".basis")).to_contain_text("too short to time")


def test_small_figures_are_written_without_an_exponent(open_page):
    page = open_page()
    small = "args.map((value) => m.small(value))"
    assert evaluate(page, "format.js", small, 0, 2.5e-5, 0.00012, 0.0123, 12.34) == [
        "0.000",
        "0.000025",
        "0.00012",
        "0.012",
        "12.3",
    ]
