"""The compare page in a real Chromium: what a person types, sees, and can reach with a keyboard."""

import json
import re
import shutil

import httpx
import numpy as np
import pytest
from live_server import CONTEXT, DEADLINE_S, ENDLESS, HYBRID, LiveServer, poll, suspended
from scipy import stats

from server.hub import window as ab

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'"
)
from playwright.sync_api import expect  # noqa: E402

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

KEY = "browser-0123456789abcdef"
PATIENCE_MS = 1000 * DEADLINE_S
expect.set_options(timeout=PATIENCE_MS)
DONE = re.compile("^Done")


@pytest.fixture(scope="module")
def lab(checkpoints, tmp_path_factory):
    """A server that wants a key; its reduced checkpoint is a copy, so that a test may take it away, and its states are
    narrower, too."""
    directory = tmp_path_factory.mktemp("ui")
    reduced = shutil.copytree(checkpoints["reduced"], directory / "reduced")
    config = directory / "lowkey.toml"
    config.write_text(
        f'[variants]\ndense = "{checkpoints["dense"]}"\n'
        f'[variants.reduced]\nsource = "{reduced}"\nstate_dtype = "bfloat16"\n'
    )
    server = LiveServer(directory / "log", "--config", str(config), LOWKEY_API_KEYS=f"browser={KEY}")
    server.http.headers["authorization"] = f"Bearer {KEY}"
    try:
        yield server.wait_ready()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, lab):
    """Opens the page; at the end nothing may have gone wrong in it, and nothing been asked of another host."""
    contexts, wrong = [], []

    def open_it(*, width=1280, height=900, key=KEY, **options):
        context = browser.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda m: wrong.append(m.text) if "Content Security Policy" in m.text else None)
        page.on("request", lambda r: None if r.url.startswith(lab.url) else wrong.append(r.url))
        page.goto(lab.url)
        if key:
            give_key(page, key)
            expect(page.get_by_role("checkbox", name="dense")).to_be_checked()
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert not wrong


def give_key(page, key):
    page.get_by_label("Key", exact=True).fill(key)
    page.get_by_role("button", name="Use key").click()


def fill(page, prompt="Once upon a time", max_tokens=40, temperature=0, **options):
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Max tokens").fill(str(max_tokens))
    page.get_by_label("Temperature").fill(str(temperature))
    page.locator("summary").click()
    page.get_by_label("Go on after the end of text").check()
    for label, value in options.items():
        page.get_by_label(label.replace("_", " ")).fill(str(value))


def start(page):
    page.get_by_role("button", name="Run").click()


def card(page, variant):
    return page.locator(f".card[data-variant={variant}]")


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def speed_ratio(page):
    """The ratio or why there is none, and what it rests on."""
    figure = page.locator(".strip .figure").nth(1)
    return figure.locator(".value"), figure.locator(".unit")


def answer_with(page, ratios, speeds=(100.0, 100.0)):
    """Timed comparisons come back with these speed ratios, one after the other; the bodies that were sent."""
    sent, left = [], list(ratios)

    def handle(route):
        body = route.request.post_data_json
        sent.append(body)
        *events, last, done, end = route.fetch(timeout=PATIENCE_MS).text().split("\n\n")
        answer = json.loads(last.removeprefix("data: "))
        if not body["parallel"]:
            answer["results"][1]["against_baseline"]["tokens_per_second_ratio"] = left.pop(0)
            for result, speed in zip(answer["results"], speeds, strict=True):
                result["lowkey"]["tokens_per_second"] = speed
        text = "\n\n".join([*events, f"data: {json.dumps(answer)}", done, end])
        route.fulfill(body=text, content_type="text/event-stream")

    page.route("**/v1/compare", handle)
    return sent


def interval(ratios):
    """Geometric mean and 95 % t interval, by scipy."""
    logs = np.log(ratios)
    low, high = stats.t.interval(0.95, len(logs) - 1, logs.mean(), stats.sem(logs))
    return np.exp([logs.mean(), low, high])


def test_the_page_is_served_safely_and_may_be_kept(lab):
    page = httpx.get(lab.url, timeout=DEADLINE_S)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert page.headers["cache-control"] == "no-cache"
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)|https?://", page.text)
    files = re.findall(r'"(ui/[0-9a-f]{12}/[a-z]+\.[a-z]+)"', page.text)
    assert len(files) == 3
    for file in files:
        response = httpx.get(f"{lab.url}/{file}", timeout=DEADLINE_S)
        assert response.status_code == 200 and "immutable" in response.headers["cache-control"]
    for path, refusals in (
        (files[0].replace("ui/", "ui/0"), [404]),
        (f"{files[0]}/../../../settings.py", [401, 404]),
    ):
        assert httpx.get(f"{lab.url}/{path}", timeout=DEADLINE_S).status_code in refusals


def test_a_key_is_asked_for_and_kept_in_memory_only(open_page):
    page = open_page(key=None)
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("needs an API key")
    give_key(page, "wrong-0123456789abcdef")
    expect(dialog).to_contain_text("not known")
    give_key(page, KEY)
    expect(page.locator("#fleet")).to_contain_text("reduced d_k 16")
    expect(dialog).to_be_hidden()
    assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.reload()
    expect(dialog).to_contain_text("needs an API key")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert")).to_contain_text("API key")


@pytest.mark.skipif(HYBRID, reason="the next test has the figures of hybrids")
def test_each_variant_has_its_states_bytes_and_dtype(open_page, lab):
    page = open_page()
    fill(page, max_tokens=5)
    start(page)
    expect(page.locator("#status")).to_have_text(DONE)
    states = []
    for variant, dtype in (("dense", "float32"), ("reduced", "bfloat16")):
        told = lab.http.get(f"/v1/models/{variant}").json()["lowkey"]
        assert told["state_dtype"] == dtype
        states.append(f"{told['state_bytes'] / 1000:.1f} kB {dtype}")
        expect(page.locator("#fleet")).to_contain_text(f"{variant} d_k {told['d_k']} \u00b7 {states[-1]}")
        expect(card(page, variant).locator(".figures .figure").nth(2)).to_contain_text(dtype)
    hint = page.locator(".strip .figure").first.get_attribute("title")
    assert hint == f"{states[1]} of {states[0]} per request"


@pytest.mark.skipif(HYBRID, reason="it is held against a variant that has none")
def test_keys_and_values_are_shown_beside_the_state(open_page):
    page = open_page()
    script = page.locator("script[src]").get_attribute("src").replace("app.js", "view.js")
    show = """async ([file, model, held]) => {
        const { Card, fleet } = await import(`/${file}`);
        const card = new Card("reduced", 1, false);
        card.figures(held);
        return [fleet([model])[0].textContent, card.state.node.textContent];
    }"""
    model = {"status": "up", "d_k": 64, "state_bytes": 77_856_768, "state_dtype": "int8", "slots": 1062}
    held = {"state_bytes": 4_500_000, "state_dtype": "int8", "kv_bytes": 0}
    linear = page.evaluate(show, [script, {"id": "a", "lowkey": model}, held])
    assert linear == ["a d_k 64 \u00b7 77.9 MB int8 \u00b7 1,062 slots", "State4.50 MBint8"]
    model |= {"kv_bytes_per_token": 65_536, "pages": 4027}
    hybrid = page.evaluate(show, [script, {"id": "a", "lowkey": model}, held | {"kv_bytes": 4_194_304}])
    assert hybrid[0].endswith("77.9 MB int8 + 65.5 kB a token \u00b7 1,062 slots, 4,027 pages")
    assert hybrid[1] == "State4.50 MBint8, KV 4.19 MB"


def test_a_run_shows_both_answers_and_their_figures(open_page, lab):
    page = open_page()
    fill(page, seed=5)
    start(page)
    expect(page.locator("#status")).to_have_text(DONE)
    body = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    answer = lab.http.post("/v1/compare", json=body).json()
    for result in answer["results"]:
        shown = card(page, result["variant"])
        assert shown.locator(".text").inner_text() == result["text"]
        expect(shown.locator(".note")).to_have_text("40 tokens, token limit")
        speed, ttft, state = shown.locator(".figures .value").all_inner_texts()
        assert float(speed) > 0 and re.fullmatch(r"[\d.]+ m?s", ttft)
        assert state == f"{result['lowkey']['state_bytes'] / 1000:.1f} kB"
        # From no token to all of them, by one point for each piece of text.
        points = shown.locator(".progress polyline").get_attribute("points").split()
        heights = [float(point.split(",")[1]) for point in points]
        assert len(points) > 2 and heights == sorted(heights, reverse=True) and heights[0] > heights[-1]
    difference = answer["results"][1]["against_baseline"]
    split = card(page, "reduced").locator(".after").inner_text()
    tokens = answer["results"][1]["tokens"]
    assert split == "".join(tokens[difference["first_divergence"] :])
    assert card(page, "dense").locator(".split").count() == 1
    assert card(page, "reduced").locator(".heat rect[data-i]").count() == 40
    assert card(page, "reduced").locator(".disagrees").count() == difference["agree"].count(False)
    figures = page.locator(".strip .value").all_inner_texts()
    assert figures[1] == "not enough data", "one timed run"
    assert float(figures[2]) == pytest.approx(difference["mean_kl"], abs=0.002)
    assert figures[4] == f"token {difference['first_divergence'] + 1}"
    expect(page.get_by_role("row")).to_have_count(2)


RATIOS = [0.78, 0.87, 1.14, 0.84, 1.00, 1.34, 0.95, 1.02, 0.9, 1.1, 0.99]
"""Speed ratios of one prompt, as one run after the other gives them on a busy machine."""


@pytest.mark.parametrize("runs", [5, 6, 11, 61])
def test_the_interval_is_students_over_logarithms(open_page, runs):
    page = open_page()
    ratios = np.resize(RATIOS, runs).tolist()
    script = page.locator("script[src]").get_attribute("src").replace("app.js", "timing.js")
    estimate = "async ([file, ratios]) => (await import(`/${file}`)).estimate(ratios)"
    found = page.evaluate(estimate, [script, ratios])
    # The quantile is that of an expansion: a thousandth of it is below what the page shows.
    assert [found["mean"], found["low"], found["high"]] == pytest.approx(interval(ratios), rel=1e-3)
    assert found["mean"] == pytest.approx(ab._estimate_ratio(np.array(ratios))["mean"], rel=1e-12)
    few = page.evaluate(estimate, [script, ratios[:4]])
    assert few["low"] is None and few["high"] is None and few["runs"] == 4


def test_speed_has_an_interval_once_it_was_timed_often_enough(open_page):
    page = open_page()
    sent = answer_with(page, RATIOS)
    value, basis = speed_ratio(page)
    fill(page)
    start(page)
    expect(page.locator("#status")).to_have_text(DONE)
    expect(value).to_have_text("not enough data")
    expect(basis).to_have_text("timed runs: 1 of at least 5")
    expect(page.locator("#history-rows")).to_contain_text("not enough data")
    expect(card(page, "dense").locator(".basis")).to_contain_text("one timed run")
    for repeats, runs in enumerate((6, 11), 1):
        press(page, "Repeat 5 times")
        expect(basis).to_contain_text(f"{runs} runs")
        mean, low, high = interval(RATIOS[:runs])
        expect(value).to_have_text(f"{mean:.2f}\u00d7")
        expect(basis).to_have_text(f"[{low:.2f}, {high:.2f}], {runs} runs")
        expect(page.locator("#history-rows")).to_contain_text(basis.inner_text())
        expect(card(page, "dense").locator(".basis")).to_contain_text(f"{runs} timed runs")
        assert len(sent) == 2 + 5 * repeats and all(body == sent[1] for body in sent[2:])


def test_another_prompt_starts_anew_and_the_old_run_can_be_gone_on_with(open_page):
    page = open_page()
    answer_with(page, RATIOS)
    value, basis = speed_ratio(page)
    fill(page)
    start(page)
    expect(page.locator("#status")).to_have_text(DONE)
    press(page, "Repeat 5 times")
    expect(basis).to_contain_text("6 runs")
    fill(page, prompt="Another")
    start(page)
    expect(page.get_by_role("row")).to_have_count(3)
    expect(value).to_have_text("not enough data")
    expect(basis).to_have_text("timed runs: 1 of at least 5")
    page.locator("#history-rows button").last.click()
    expect(basis).to_contain_text("6 runs")


def test_a_repeat_can_be_stopped_and_keeps_what_it_has(open_page, lab):
    page = open_page()
    _, basis = speed_ratio(page)
    fill(page)
    start(page)
    expect(page.locator("#status")).to_have_text(DONE)
    text = card(page, "reduced").locator(".text").inner_text()
    sent = []

    def hold_the_third(route):
        sent.append(route.request.post_data_json)
        if len(sent) < 3:
            route.continue_()

    page.route("**/v1/compare", hold_the_third)
    press(page, "Repeat 5 times")
    expect(page.locator("#repeat-note")).to_contain_text("Repeat 3 of 5")
    expect(page.get_by_role("button", name="Run")).to_be_disabled()
    press(page, "Stop")
    expect(page.locator("#repeat-note")).to_have_text("Stopped after 2 of 5 repeats.")
    expect(basis).to_have_text("timed runs: 3 of at least 5")
    page.unroute("**/v1/compare")
    page.route("**/v1/compare", lambda route: route.abort())
    press(page, "Repeat 5 times")
    expect(page.get_by_role("alert")).to_contain_text("can't be reached")
    expect(page.locator("#repeat-note")).to_have_text("Stopped after 0 of 5 repeats.")
    expect(basis).to_have_text("timed runs: 3 of at least 5")
    page.unroute("**/v1/compare")
    with suspended(lab.engines()["reduced"]):
        press(page, "Repeat 5 times")
        expect(page.locator("#repeat-note")).to_contain_text("Repeat 1 of 5")
        press(page, "Stop")
        expect(page.locator("#repeat-note")).to_have_text("Stopped after 0 of 5 repeats.")
    assert len(sent) == 3
    assert card(page, "reduced").locator(".text").inner_text() == text
    lab.wait_idle("dense")
    lab.wait_idle("reduced")
    press(page, "Repeat 5 times")
    expect(basis).to_contain_text("8 runs")


def test_answers_too_short_to_time_say_so(open_page):
    page = open_page()
    answer_with(page, [None] * 6, speeds=(None, None))
    value, _ = speed_ratio(page)
    fill(page, max_tokens=5)
    start(page)
    expect(page.locator("#repeat-note")).to_contain_text("Timed once")
    press(page, "Repeat 5 times")
    expect(page.locator("#repeat-note")).to_contain_text("Timed 6 times")
    expect(value).to_have_text("too short to time")
    expect(page.locator("#history-rows")).to_contain_text("too short to time")
    for variant in ("dense", "reduced"):
        expect(card(page, variant).locator(".figures .value").first).to_have_text("\u2013")
        expect(card(page, variant).locator(".basis")).to_contain_text("too short to time")


def test_both_streams_are_seen_while_they_come_and_can_be_stopped(open_page, lab):
    page = open_page()
    fill(page, max_tokens=ENDLESS)
    start(page)
    for variant in ("dense", "reduced"):
        expect(card(page, variant).locator(".note")).to_have_text(re.compile(r"^\d\d+ tokens$"))
        expect(card(page, variant).locator(".caret")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Run")).to_be_enabled()
    lab.wait_idle("dense")
    lab.wait_idle("reduced")


def test_errors_are_words(open_page):
    page = open_page()
    fill(page, max_tokens=CONTEXT + 1)
    start(page)
    expect(page.get_by_role("alert")).to_contain_text(f"the context length is {CONTEXT} tokens")
    page.get_by_role("checkbox", name="reduced").uncheck()
    start(page)
    expect(page.get_by_role("alert")).to_have_text("Choose at least two variants to compare.")
    page.get_by_role("checkbox", name="reduced").check()
    page.route("**/v1/compare", lambda route: route.abort())
    start(page)
    expect(page.get_by_role("alert")).to_have_text("The server can't be reached. Is it still running?")


def test_all_is_reached_with_the_keyboard(open_page):
    page = open_page()
    fill(page, max_tokens=5)
    page.get_by_label("Then time").uncheck()
    page.get_by_label("Prompt", exact=True).focus()
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("() => document.activeElement.name || document.activeElement.id"))
        if seen[-1] == "run":
            break
    assert seen == ["variant", "variant", "baseline", "max_tokens", "temperature", "run"]
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text(DONE)
    expect(speed_ratio(page)[1]).to_have_text("timed runs: 0 of at least 5")
    heat = page.locator(".heat")
    heat.focus()
    page.keyboard.press("End")
    expect(page.locator(".readout")).to_contain_text("token 5 ")
    page.keyboard.press("ArrowLeft")
    expect(heat).to_have_attribute("aria-valuenow", "4")
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("row")).to_have_count(3)
    page.locator("#history-rows button").last.press("Enter")
    expect(page.locator("#status")).to_have_text("A run from the history.")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_sideways_scrolling(open_page, scheme):
    page = open_page(width=360, height=740, color_scheme=scheme)
    fill(page, prompt="x" * 300, max_tokens=30)
    start(page)
    expect(page.locator("#status")).to_have_text(DONE)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    press(page, "Repeat 5 times")
    expect(speed_ratio(page)[1]).to_contain_text("6 runs")
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background))) > 3 * 128
    assert light == (scheme == "light")


def test_a_variant_that_dies_is_seen_and_named(open_page, lab):
    """The last one: it does not come back."""
    page = open_page()
    fill(page, max_tokens=ENDLESS)
    start(page)
    expect(card(page, "reduced").locator(".note")).to_have_text(re.compile(r"^\d\d+ tokens$"))
    engine = lab.engines()["reduced"]
    directory = lab.log.parent / "reduced"
    directory.rename(directory.with_name("gone"))
    engine.kill()
    expect(page.get_by_role("alert")).to_contain_text("'reduced' went down")
    assert card(page, "dense").locator(".text").inner_text()
    poll(lambda: lab.sample("lowkey_engine_up", variant="reduced", engine="0") == 0, "it is down")
    expect(page.locator("#fleet .down")).to_contain_text("reduced")
    start(page)
    expect(page.get_by_role("alert")).to_contain_text("'reduced' is down")
