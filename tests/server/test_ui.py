"""The compare page in a real Chromium: what a person types, sees, and can reach with a keyboard."""

import re
import shutil

import httpx
import pytest
from live_server import CONTEXT, DEADLINE_S, ENDLESS, LiveServer, poll

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
    """A server that wants a key; its reduced checkpoint is a copy, so that a test may take it away."""
    directory = tmp_path_factory.mktemp("ui")
    reduced = shutil.copytree(checkpoints["reduced"], directory / "reduced")
    arguments = [f"dense={checkpoints['dense']}", f"reduced={reduced}"]
    server = LiveServer(directory / "log", *arguments, LOWKEY_API_KEYS=f"browser={KEY}")
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
        assert shown.locator(".progress polyline").get_attribute("points").count(",") > 30
    difference = answer["results"][1]["against_baseline"]
    split = card(page, "reduced").locator(".after").inner_text()
    tokens = answer["results"][1]["tokens"]
    assert split == "".join(tokens[difference["first_divergence"] :])
    assert card(page, "dense").locator(".split").count() == 1
    assert card(page, "reduced").locator(".heat rect[data-i]").count() == 40
    assert card(page, "reduced").locator(".disagrees").count() == difference["agree"].count(False)
    figures = page.locator(".strip .value").all_inner_texts()
    assert float(figures[1].rstrip("\u00d7")) > 0, "from the timed run"
    assert float(figures[2]) == pytest.approx(difference["mean_kl"], abs=0.002)
    assert figures[4] == f"token {difference['first_divergence'] + 1}"
    expect(page.get_by_role("row")).to_have_count(2)


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
    expect(page.locator(".strip .value").nth(1)).to_have_text("\u2013")  # not timed
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
