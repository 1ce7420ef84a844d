"""The compare tab in a real Chromium: runs, what is shown of them, repeats, errors, and the runs before."""

import json
import re

import pytest
from live_server import CONTEXT, ENDLESS, HYBRID, poll, suspended

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
from browser import CHROMIUM
from compare_page import DONE, RATIOS, answer_with, card, figure, fill, history, press, run, start
from playwright.sync_api import expect

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


@pytest.mark.skipif(
    HYBRID, reason="test_keys_and_values_are_shown_beside_the_state has the figures of hybrids"
)
def test_each_variant_has_its_states_bytes_and_dtype(open_page, lab):
    page = open_page()
    fill(page, max_tokens=5)
    run(page)
    states = []
    for variant, dtype in (("dense", "float32"), ("reduced", "bfloat16")):
        told = lab.http.get(f"/v1/models/{variant}").json()["lowkey"]
        assert told["state_dtype"] == dtype
        states.append(f"{told['state_bytes'] / 1000:.1f} kB {dtype}")
        expect(page.locator("#fleet")).to_contain_text(f"{variant} d_k {told['d_k']} \u00b7 {states[-1]}")
        expect(card(page, variant).locator(".figures .figure").nth(2)).to_contain_text(dtype)
    expect(figure(page, "State per request")[1]).to_have_text(f"{states[1]} of {states[0]}")


def test_a_run_shows_both_answers_and_their_figures(open_page, lab):
    page = open_page()
    fill(page, Seed=5)
    run(page)
    body = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    answer = lab.http.post("/v1/compare", json=body).json()
    for result in answer["results"]:
        shown = card(page, result["variant"])
        assert shown.locator(".text").inner_text() == result["text"]
        expect(shown.locator(".note")).to_have_text("40 tokens, token limit")
        speed, ttft, state = shown.locator(".figures .value").all_inner_texts()
        assert float(speed) > 0 and re.fullmatch(r"[\d.]+ m?s", ttft)
        assert state == f"{result['lowkey']['state_bytes'] / 1000:.1f} kB"
    difference = answer["results"][1]["against_baseline"]
    split = card(page, "reduced").locator(".after").inner_text()
    tokens = answer["results"][1]["tokens"]
    assert split == "".join(tokens[difference["first_divergence"] :])
    assert card(page, "dense").locator(".split").count() == 1
    assert card(page, "reduced").locator(".heat rect[data-i]").count() == 40
    assert card(page, "reduced").locator(".disagrees").count() == difference["agree"].count(False)
    expect(figure(page, "Tokens/s")[0]).to_have_text("not enough data")
    shown = float(figure(page, "Mean KL")[0].inner_text())
    assert shown == pytest.approx(difference["mean_kl"], abs=0.002)
    expect(figure(page, "Answers part at")[0]).to_have_text(f"token {difference['first_divergence'] + 1}")
    dense, reduced = (result["prompt_perplexity"] for result in answer["results"])
    value, whose = figure(page, "Prompt perplexity")
    assert float(value.inner_text()) == pytest.approx(reduced, rel=2e-3)
    said = re.fullmatch(r"dense has ([\d.]+); lower is better", whose.inner_text())
    assert said and float(said[1]) == pytest.approx(dense, rel=2e-3)


def test_another_prompt_starts_anew_and_the_old_run_can_be_gone_on_with(open_page):
    page = open_page()
    answer_with(page, [*RATIOS, 1.0])
    value, basis = figure(page, "Tokens/s")
    fill(page)
    run(page)
    press(page, "Repeat 5 times")
    expect(basis).to_contain_text("6 runs")
    fill(page, prompt="Another")
    start(page)
    expect(history(page)).to_have_count(3)
    expect(value).to_have_text("not enough data")
    expect(basis).to_have_text("timed runs: 1 of at least 5")
    history(page).nth(1).get_by_role("button").click()
    expect(basis).to_contain_text("6 runs")
    press(page, "Repeat 5 times")
    expect(basis).to_contain_text("11 runs")


def test_runs_can_be_told_apart_and_used_again(open_page):
    page = open_page()
    fill(page, max_tokens=5)
    run(page)
    first = card(page, "dense").locator(".text").inner_text()
    fill(page, max_tokens=6, temperature=0.9, Seed=7, Top_p=0.8)
    start(page)
    expect(history(page)).to_have_count(3)
    newest, older, recorded = (history(page).nth(i) for i in range(3))
    expect(newest).to_contain_text(re.compile(r"Run 2\d\d:\d\d:\d\d"))
    expect(newest).to_contain_text("6 tokens, temperature 0.9, top_p 0.8, seed 7, past the end of text")
    expect(older).to_contain_text("Run 1")
    expect(older).to_contain_text(re.compile(r"5 tokens, temperature 0, seed \d+"))
    expect(recorded).to_contain_text("Recorded")
    expect(newest).to_have_attribute("aria-current", "true")
    fill(page, prompt="Yet another", max_tokens=9)
    page.get_by_role("checkbox", name="reduced").uncheck()
    older.get_by_role("button").click()
    expect(page.locator("#status")).to_contain_text("Run 1 is on show")
    expect(history(page).nth(1)).to_have_attribute("aria-current", "true")
    assert card(page, "dense").locator(".text").inner_text() == first
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("Once upon a time")
    expect(page.get_by_label("Max tokens")).to_have_value("5")
    expect(page.get_by_label("Temperature")).to_have_value("0")
    expect(page.get_by_label("Top p")).to_have_value("")
    expect(page.get_by_label("Seed")).to_have_value(re.compile(r"^\d+$"))
    expect(page.get_by_role("checkbox", name="reduced")).to_be_checked()
    run(page)
    assert card(page, "dense").locator(".text").inner_text() == first


def test_a_repeat_can_be_stopped_and_keeps_what_it_has(open_page, lab):
    page = open_page()
    _, basis = figure(page, "Tokens/s")
    fill(page)
    run(page)
    text = card(page, "reduced").locator(".text").inner_text()
    sent = []

    def hold_the_third(route):
        sent.append(route.request.post_data_json)
        if len(sent) < 3:
            route.continue_()

    page.route("**/v1/compare", hold_the_third)
    press(page, "Repeat 5 times")
    expect(page.locator("#repeat-note")).to_contain_text("Repeat 3 of 5")
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_disabled()
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


def test_both_streams_are_seen_while_they_come_and_can_be_stopped(open_page, lab):
    page = open_page()
    fill(page, max_tokens=ENDLESS)
    start(page)
    for variant in ("dense", "reduced"):
        expect(card(page, variant).locator(".note")).to_have_text(re.compile(r"^\d\d+ tokens$"))
        expect(card(page, variant).locator(".caret")).to_be_visible()
    expect(page.get_by_role("button", name="Stop", exact=True)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("Stopped.")
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_enabled()
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_focused()
    for variant in ("dense", "reduced"):
        expect(card(page, variant).locator(".note")).to_have_text("stopped")
    lab.wait_idle("dense")
    lab.wait_idle("reduced")
    # A run that fails after one that was stopped leaves no dead cards either.
    page.route("**/v1/compare", lambda route: route.abort())
    start(page)
    expect(page.get_by_role("alert")).to_contain_text("can't be reached")
    expect(page.locator("#recorded")).to_be_visible()
    expect(page.locator(".card .note", has_text="waiting")).to_have_count(0)


@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_nothing_moves_for_who_wants_no_motion(open_page, lab, motion):
    page = open_page(reduced_motion=motion)
    fill(page, max_tokens=ENDLESS)
    start(page)
    expect(card(page, "dense").locator(".caret")).to_be_visible()
    name = "none" if motion == "reduce" else "blink"
    expect(card(page, "dense").locator(".caret")).to_have_css("animation-name", name)
    press(page, "Stop")
    expect(page.locator("#status")).to_have_text("Stopped.")
    lab.wait_idle("dense")
    lab.wait_idle("reduced")


def test_errors_are_words_and_leave_no_dead_cards(open_page):
    page = open_page()
    fill(page, max_tokens=5)
    run(page)
    text = card(page, "dense").locator(".text").inner_text()

    def the_run_before_is_back():
        expect(page.locator(".card")).to_have_count(2)
        assert card(page, "dense").locator(".text").inner_text() == text
        expect(figure(page, "Mean KL")[0]).to_have_text(re.compile(r"\d"))
        expect(page.locator(".card .note").first).to_have_text("5 tokens, token limit")
        expect(page.locator("#status")).to_have_text("Run 1 is on show.")

    fill(page, max_tokens=CONTEXT + 1)
    start(page)
    expect(page.get_by_role("alert")).to_contain_text(f"the context length is {CONTEXT} tokens")
    the_run_before_is_back()
    page.route("**/v1/compare", lambda route: route.abort())
    start(page)
    expect(page.get_by_role("alert")).to_have_text("The server can't be reached. Is it still running?")
    the_run_before_is_back()
    page.get_by_role("checkbox", name="reduced").uncheck()
    start(page)
    expect(page.get_by_role("alert")).to_have_text("Choose at least two variants to compare.")
    the_run_before_is_back()


def test_an_error_on_the_first_run_shows_the_recorded_one_again(open_page):
    page = open_page()
    recorded = card(page, "dense").locator(".text").inner_text()
    page.route("**/v1/compare", lambda route: route.abort())
    fill(page)
    start(page)
    expect(page.get_by_role("alert")).to_contain_text("can't be reached")
    expect(page.locator("#recorded")).to_be_visible()
    assert card(page, "dense").locator(".text").inner_text() == recorded


def test_what_an_error_cut_off_stays_without_the_cards_that_had_nothing(open_page):
    page = open_page()
    lowkey = {
        "ttft_s": 0.01,
        "decode_s": 0.0,
        "tokens_per_second": None,
        "state_bytes": 1,
        "state_dtype": "int8",
    }
    chunk = {"id": "cmp-1", "object": "compare.chunk", "variant": "dense", "text": "It was", "lowkey": lowkey}
    events = [chunk | {"usage": {"completion_tokens": 2}}, {"error": {"message": "it broke", "code": 503}}]
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    page.route("**/v1/compare", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    fill(page)
    start(page)
    expect(page.get_by_role("alert")).to_have_text("It broke")
    expect(page.locator(".card")).to_have_count(1)
    expect(card(page, "dense").locator(".text")).to_have_text("It was", use_inner_text=True)
    expect(card(page, "dense").locator(".note")).to_have_text("broke off")
    expect(page.locator("#verdict")).to_be_hidden()


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
    expect(page.get_by_role("button", name="Run", exact=True)).to_be_focused()
    expect(figure(page, "Tokens/s")[1]).to_have_text("timed runs: 0 of at least 5")
    heat = page.locator(".heat")
    heat.focus()
    page.keyboard.press("End")
    expect(page.locator(".readout")).to_contain_text("token 5 ")
    page.keyboard.press("ArrowLeft")
    expect(heat).to_have_attribute("aria-valuenow", "4")
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.press("Control+Enter")
    expect(history(page)).to_have_count(3)
    history(page).nth(1).get_by_role("button").press("Enter")
    expect(page.locator("#status")).to_contain_text("Run 1 is on show")


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
    expect(card(page, "dense").locator(".note")).to_have_text("broke off")
    poll(lambda: lab.sample("lowkey_engine_up", variant="reduced", engine="0") == 0, "it is down")
    expect(page.locator("#fleet .down")).to_contain_text("reduced")
    start(page)
    expect(page.get_by_role("alert")).to_contain_text("'reduced' is down")
