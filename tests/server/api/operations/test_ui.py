"""The page in a real Chromium: how it is served, its key, its tabs, and what it shows before anything was asked."""

import json
import re
from pathlib import Path

import httpx
import pytest
from live_server import DEADLINE_S, HYBRID

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
from browser import CHROMIUM
from compare_page import KEY, card, evaluate, figure, fill, give_key, run
from contrast import low_contrast
from playwright.sync_api import expect

from server.api.operations import ui

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

RECORDED = json.loads((Path(ui.__file__).parent / "page" / "recorded.json").read_text())


def test_the_page_is_served_safely_and_may_be_kept(lab):
    page = httpx.get(lab.url, timeout=DEADLINE_S)
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert page.headers["cache-control"] == "no-cache"
    own = page.text.replace('<a href="https://arxiv.org/abs/2602.04852">', "")
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)|https?://", own)
    files = re.findall(r'"(ui/[0-9a-f]{12}/[a-z]+\.[a-z]+)["#]', page.text)
    assert {"app.js", "style.css", "icon.svg", "method.md"} <= {file.rsplit("/", 1)[1] for file in files}
    for file in [*files, files[0].rsplit("/", 1)[0] + "/recorded.json"]:
        response = httpx.get(f"{lab.url}/{file}", timeout=DEADLINE_S)
        assert response.status_code == 200 and "immutable" in response.headers["cache-control"]
    for path, refusals in (
        (files[0].replace("ui/", "ui/0"), [404]),
        (f"{files[0]}/../../../settings.py", [401, 404]),
    ):
        assert httpx.get(f"{lab.url}/{path}", timeout=DEADLINE_S).status_code in refusals


def test_a_key_is_asked_for_and_kept_in_memory_only(open_page):
    page = open_page(key="")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("needs an API key")
    give_key(page, "wrong-0123456789abcdef")
    expect(dialog).to_contain_text("not known")
    page.get_by_label("Key", exact=True).fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#fleet")).to_contain_text("reduced d_k 16")
    expect(dialog).to_be_hidden()
    assert page.evaluate("() => [localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.reload()
    expect(dialog).to_contain_text("needs an API key")
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("alert")).to_contain_text("API key")


def test_tabs_follow_the_address(open_page, lab):
    page = open_page()
    tabs = page.get_by_role("navigation").get_by_role("link")
    assert tabs.all_inner_texts() == ["Compare", "A/B", "Memory"]
    steps = [
        ("compare", lambda: None),
        ("ab", lambda: tabs.nth(1).click()),
        ("memory", lambda: tabs.nth(2).press("Enter")),
        ("ab", page.go_back),
        ("compare", lambda: page.goto(f"{lab.url}/#no-such-tab")),
    ]
    for name, step in steps:
        step()
        expect(page.locator("main > .tab:not([hidden])")).to_have_id(f"tab-{name}")
        expect(page.locator("nav [aria-current=page]")).to_have_attribute("href", f"#{name}")
        shown = tabs.nth(["compare", "ab", "memory"].index(name)).inner_text()
        expect(page).to_have_title(f"Lowkey: {shown}")
    page.goto(f"{lab.url}/#memory")
    page.reload()
    expect(page.locator("main > .tab:not([hidden])")).to_have_id("tab-memory")


def test_the_first_screen_is_a_recorded_comparison_that_says_so(open_page):
    page = open_page()
    words = page.locator("#recorded")
    expect(words).to_be_in_viewport()
    for part in ("recorded", RECORDED["when"], RECORDED["models"], RECORDED["machine"]):
        expect(words).to_contain_text(part)
    dense, reduced = RECORDED["answer"]["results"]
    difference = reduced["against_baseline"]
    expected = {
        "State per request": f"{difference['state_bytes_ratio']:.2f}\u00d7",
        "Mean KL": f"{difference['mean_kl']:.3f}",
        "Answers part at": f"token {difference['first_divergence'] + 1}",
        "Prompt perplexity": f"{reduced['prompt_perplexity']:.1f}",
    }
    for label, value in expected.items():
        expect(figure(page, label)[0]).to_have_text(value)
        expect(figure(page, label)[0]).to_be_in_viewport()
    # Two perplexities stand there, and each says whose it is.
    expect(figure(page, "Prompt perplexity")[1]).to_contain_text(
        f"dense has {dense['prompt_perplexity']:.1f}"
    )
    for result in (dense, reduced):
        assert card(page, result["variant"]).locator(".text").inner_text().strip() == result["text"].strip()
        expect(card(page, result["variant"]).locator(".text")).to_be_in_viewport()
    expect(page.locator("#history")).to_be_hidden()
    expect(page.get_by_role("button", name="Repeat 5 times")).to_be_hidden()
    fill(page, max_tokens=5)
    run(page)
    expect(words).to_be_hidden()
    expect(card(page, "dense").locator(".text")).not_to_contain_text("read_lines")
    page.locator("#history-rows tr", has_text="Recorded").get_by_role("button").click()
    expect(words).to_be_visible()
    expect(page.get_by_role("button", name="Repeat 5 times")).to_be_hidden()


@pytest.mark.parametrize("word", ["dense", "reduced", "d_k", "state"])
def test_each_word_has_a_sentence_and_a_place_in_the_docs(open_page, lab, word):
    page = open_page()
    sentence = page.locator(f"#words dt:text-is('{word}') + dd")
    expect(sentence).to_be_visible()
    link = sentence.get_by_role("link")
    assert re.search(r"\w{4}.*\.", sentence.inner_text().removesuffix(link.inner_text()))
    href = link.get_attribute("href")
    path, fragment = href.split("#:~:text=")
    text = httpx.get(f"{lab.url}/{path}", timeout=DEADLINE_S)
    assert text.headers["content-type"] == "text/plain; charset=utf-8"
    heading = re.escape(fragment.replace("%20", " "))
    assert re.search(rf"^#+ {heading}$", text.text, re.MULTILINE), "the heading that the link goes to"


def test_an_installed_package_has_no_docs_and_no_links_to_them(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "method.md").write_text("somebody else's")
    assert ui.read_docs(tmp_path) == {}
    (tmp_path / "pyproject.toml").touch()
    assert ui.read_docs(tmp_path) == {"method.md": b"somebody else's"}
    page = b'<p>A word. <a class="doc" href="method.md#x">More</a> <a href="app.js">this</a></p>'
    assert ui.versioned(page, {"app.js"}, "1") == b'<p>A word. <a href="ui/1/app.js">this</a></p>'
    linked = b'<p>A word. <a class="doc" href="ui/1/method.md#x">More</a> <a href="ui/1/app.js">this</a></p>'
    assert ui.versioned(page, {"app.js", "method.md"}, "1") == linked


@pytest.mark.skipif(HYBRID, reason="it is held against a variant that has none")
def test_keys_and_values_are_shown_beside_the_state(open_page):
    page = open_page()
    model = {"status": "up", "d_k": 64, "state_bytes": 77_856_768, "state_dtype": "int8", "slots": 1062}
    held = {"state_bytes": 4_500_000, "state_dtype": "int8", "kv_bytes": 0}
    fleet = "m.fleet([{ id: 'a', lowkey: args[0] }])[0].textContent"
    kind = "`${m.bytes(args[0].state_bytes)} ${m.stateKind(args[0])}`"
    assert evaluate(page, "view.js", fleet, model) == "a d_k 64 \u00b7 77.9 MB int8 \u00b7 1,062 slots"
    assert evaluate(page, "format.js", kind, held) == "4.50 MB int8"
    model |= {"kv_bytes_per_token": 65_536, "pages": 4027}
    assert evaluate(page, "view.js", fleet, model).endswith(
        "77.9 MB int8 + 65.5 kB a token \u00b7 1,062 slots, 4,027 pages"
    )
    assert evaluate(page, "format.js", kind, held | {"kv_bytes": 4_194_304}) == "4.50 MB int8, KV 4.19 MB"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_against_what_is_behind_it(open_page, scheme):
    page = open_page(color_scheme=scheme)
    fill(page, max_tokens=30)
    run(page)
    seen, low = low_contrast(page)
    assert seen > 80 and not low


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_shows_figures_first_and_needs_no_sideways_scrolling(open_page, scheme):
    page = open_page(width=360, height=740, color_scheme=scheme)
    for label in ("State per request", "Tokens/s", "Mean KL", "Same top token", "Prompt perplexity"):
        expect(figure(page, label)[0]).to_be_in_viewport()
    expect(page.locator("#words dl")).to_be_hidden()
    fill(page, prompt="x" * 300, max_tokens=30)
    run(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    expect(figure(page, "State per request")[0]).to_be_in_viewport()
    above = page.evaluate("""() => {
        const top = (id) => document.getElementById(id).getBoundingClientRect().top;
        return top("verdict") < top("composer") && top("composer") < top("answers");
    }""")
    assert above
    page.get_by_role("button", name="Repeat 5 times").click()
    expect(figure(page, "Tokens/s")[1]).to_contain_text("6 runs")
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    page.get_by_label("Max tokens").fill("99999999")
    page.get_by_label("Max tokens").evaluate("node => node.removeAttribute('max')")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.get_by_role("alert")).to_be_in_viewport()
    background = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", background))) > 3 * 128
    assert light == (scheme == "light")
