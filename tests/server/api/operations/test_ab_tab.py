"""The A/B tab in a real Chromium, over a server with traffic."""

import json
import re

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
from browser import CHROMIUM, Pages
from contrast import low_contrast
from live_server import LiveServer, poll
from playwright.sync_api import expect

from server.settings import load_settings

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")

KEY = "browser-0123456789abcdef"
SUMMARY = "**/v1/ab/summary*"
PAIRS = 34
REFRESH_MS = 10_000


@pytest.fixture(scope="module")
def lab(checkpoints, tmp_path_factory):
    """A server of two API processes that has answered requests of an alias, compared, and scored shadow traffic."""
    directory = tmp_path_factory.mktemp("ab")
    config = directory / "lowkey.toml"
    config.write_text(
        f'[variants]\ndense = "{checkpoints["dense"]}"\nreduced = "{checkpoints["reduced"]}"\n'
        "[aliases.gdn]\ndense = 0.75\nreduced = 0.25\n"
        '[[shadow]]\nfrom = "dense"\nto = "reduced"\nfraction = 1.0\n'
    )
    server = LiveServer(
        directory / "log", "--config", str(config), "--api-processes", "2", LOWKEY_API_KEYS=f"browser={KEY}"
    )
    server.http.headers["authorization"] = f"Bearer {KEY}"
    try:
        server.wait_ready()
        for i in range(PAIRS):
            body = {"prompt": f"Once upon a time {i}", "max_tokens": 20, "ignore_eos": True}
            server.http.post("/v1/compare", json=body).raise_for_status()
        for i in range(12):
            server.complete(model="gdn", prompt=f"It was {i}", max_tokens=18, user=f"user-{i}")
        server.complete(model="reduced", prompt="Directly", max_tokens=18)
        poll(lambda: not outstanding(server), "each request of dense was scored or dropped")
        yield server
    finally:
        server.stop()


def summary_of(server, **params):
    return server.http.get("/v1/ab/summary", params=params).json()


def outstanding(server):
    """Requests of dense of whose shadow nothing has been heard."""
    known = summary_of(server)
    (rule,) = known["shadow"]
    return known["variants"]["dense"]["requests"] - sum(
        rule[name] for name in ("scored", "dropped", "failed")
    )


@pytest.fixture
def pages(browser, lab):
    """Pages of the server; at the end nothing may have gone wrong in them."""
    pages = Pages(browser, lab.url)
    yield pages
    pages.close()
    assert not pages.wrong


def opened(pages, **options):
    page = pages.open("ab", key=KEY, **options)
    expect(page.locator(".pair")).to_be_visible()
    return page


def test_the_summary_says_who_gets_what_and_how_it_went(lab):
    known = summary_of(lab, points=6)
    assert known["aliases"] == {"gdn": {"dense": 0.75, "reduced": 0.25}}
    (rule,) = known["shadow"]
    assert (rule["baseline"], rule["variant"], rule["fraction"], rule["failed"]) == (
        "dense",
        "reduced",
        1.0,
        0,
    )
    for outcome in ("scored", "dropped"):
        labels = {"variant": "reduced", "baseline": "dense", "outcome": outcome}
        assert rule[outcome] == lab.sample("lowkey_shadow_requests_total", **labels), "of both API processes"
    series, (pair,) = known["series"], known["pairs"]
    assert len(series["starts"]) == 6 and series["step_s"] == 600
    for name in ("dense", "reduced"):
        assert sum(series["variants"][name]["requests"]) == known["variants"][name]["requests"]
    last = series["pairs"][0]["so_far"]["kl"][-1]
    assert (last["pairs"], last["mean"]) == (pair["kl"]["pairs"], pytest.approx(pair["kl"]["mean"]))
    assert pair["pairs"] == {"compare": PAIRS, "shadow": rule["scored"]}
    assert summary_of(lab)["series"] is None
    refused = lab.http.get("/v1/ab/summary", params={"points": 201})
    assert refused.status_code == 400 and "points" in refused.json()["error"]["message"]


def test_what_is_shown_is_the_summary(pages, lab):
    page = opened(pages)
    known = summary_of(lab)
    (pair,) = known["pairs"]
    card = page.locator(".pair")
    expect(card.locator(".lead")).to_contain_text("they choose the same token")
    for name, text in (
        ("kl", lambda v: f"{v:.3f}"),
        ("top1_agreement", lambda v: f"{100 * v:.1f} %"),
        ("speed_ratio", lambda v: f"{v:.2f}\u00d7"),
    ):
        figure, found = card.locator(f"[data-figure={name}]"), pair[name]
        expect(figure.locator(".value")).to_have_text(text(found["mean"]))
        low, high = text(found["low"]), text(found["high"])
        expect(figure.locator(".unit")).to_contain_text(f"95 % interval {low} to {high}")
    shares = page.locator(".share")
    expect(shares.first).to_contain_text("gdn")
    expect(shares.first).to_contain_text("dense 75 %")
    requests = {name: known["variants"][name]["requests"] for name in ("dense", "reduced")}
    for name, count in requests.items():
        expect(shares.last).to_contain_text(f"{count} request")
        column = list(requests).index(name)
        row = page.locator(".did tr", has_text=re.compile("^Requests"))
        expect(row.locator("td").nth(column)).to_have_text(str(count))
    (rule,) = known["shadow"]
    expect(page.locator("section", has_text="Shadow traffic").last).to_contain_text(
        f"reduced reads 100 % of what dense answered: {rule['scored']} measured, {rule['dropped']} dropped"
    )
    for chart in page.locator(".time-chart").all():
        assert chart.locator("circle").count() > 0, chart.get_attribute("aria-label")


def stub(page, change):
    """Summaries come back changed by `change` from then on."""

    def handle(route):
        answer = route.fetch().json()
        change(answer)
        route.fulfill(json=answer)

    page.route(SUMMARY, handle)


def again(page):
    """Has the tab ask at once."""
    with page.expect_response(SUMMARY):
        page.get_by_label("Figures of", exact=True).select_option(label="the last day")
    with page.expect_response(SUMMARY):
        page.get_by_label("Figures of", exact=True).select_option(label="the last hour")


def pair_with(page, **figures):
    """Shows a pair of these figures."""
    page.unroute(SUMMARY)
    stub(page, lambda answer: answer["pairs"][0].update(figures))
    again(page)
    return page.locator(".pair .lead")


def estimate(low, high, pairs=50):
    return {"mean": (low + high) / 2, "low": low, "high": high, "pairs": pairs}


def test_the_verdict_follows_the_intervals(pages):
    page = opened(pages)
    lead = pair_with(
        page,
        prompt_nll_difference=estimate(0.01, 0.03),
        speed_ratio=estimate(1.1, 1.3),
        kl=estimate(0.1, 0.2),
    )
    expect(lead).to_contain_text("reduced is measurably worse than dense at predicting your prompts")
    expect(lead).to_contain_text("reduced is faster")
    expect(page.locator("[data-figure=prompt_nll_difference]")).to_contain_text("+2.0 % of perplexity")
    lead = pair_with(page, prompt_nll_difference=estimate(-0.03, -0.01), speed_ratio=estimate(0.7, 0.9))
    expect(lead).to_contain_text("reduced is measurably better than dense")
    expect(lead).to_contain_text("reduced is slower")
    expect(page.locator("[data-figure=prompt_nll_difference] .value")).to_have_text("\u22120.020")
    lead = pair_with(page, prompt_nll_difference=estimate(-0.01, 0.01), speed_ratio=estimate(0.9, 1.1))
    expect(lead).to_contain_text("reduced and dense can't be told apart so far")
    expect(lead).to_contain_text("neither is measurably faster")
    few = {"mean": 0.1, "low": None, "high": None, "pairs": 12}
    lead = pair_with(page, kl=few, top1_agreement=few, prompt_nll_difference=few, speed_ratio=None)
    expect(lead).to_have_text("Too early to say: 12 different texts were compared, and 30 are needed.")
    expect(page.locator("[data-figure=kl]")).to_contain_text("not enough data")
    expect(page.locator("[data-figure=kl]")).to_contain_text("12 of 30 pairs")
    expect(page.locator("[data-figure=speed_ratio]")).to_contain_text("0 of 30 pairs")


def nothing(answer):
    answer.update(aliases={}, shadow=[], pairs=[])
    answer["series"]["pairs"] = []
    for name, figures in answer["variants"].items():
        figures.update(requests=0, tokens_per_second=None, ttft_s=None, itl_s=None)
        parts = answer["series"]["variants"][name]
        parts.update(
            {key: [0 if value is not None else None for value in parts[key]] for key in ("requests",)}
        )
        parts.update(tokens_per_second=[None] * 60, ttft_s=[None] * 60)


def test_empty_places_say_what_to_do(pages, lab, tmp_path):
    page = opened(pages)
    stub(page, nothing)
    again(page)
    expect(page.get_by_text("No alias is set")).to_be_visible()
    expect(page.get_by_text("No rule is set")).to_be_visible()
    expect(page.get_by_text("Nothing was compared in this time")).to_be_visible()
    command, alias, shadow = (code.text_content() for code in page.locator(".snippet code").all())
    # They are right: the server takes this configuration, and this comparison.
    config = lab.log.parent / "lowkey.toml"
    made = tmp_path / "lowkey.toml"
    made.write_text(config.read_text().split("[aliases")[0] + alias + shadow)
    settings = load_settings(made)
    assert settings.aliases == {"split": {"dense": 0.9, "reduced": 0.1}}
    (rule,) = settings.shadow
    assert (rule.source, rule.target, rule.fraction) == ("dense", "reduced", 0.05)
    body = json.loads(re.search(r"-d '(.*)'", command)[1])
    assert f"{lab.url}/v1/compare" in command
    assert lab.http.post("/v1/compare", json=body).status_code == 200
    for button in page.get_by_role("button", name="Copy").all():
        button.click()
        expect(button).to_have_text(re.compile("Copied|Selected"))
    expect(page.get_by_text("Nothing has happened in this time.")).to_be_visible()
    assert not page.locator(".time-chart").first.is_visible()


def test_an_error_is_said_and_what_was_known_stays(pages):
    page = opened(pages)
    page.route(SUMMARY, lambda route: route.abort())
    page.get_by_label("Figures of", exact=True).select_option(label="the last day")
    alert = page.get_by_role("alert")
    expect(alert).to_have_text(
        "The figures could not be read: The server can't be reached. Is it still running? What you see is older."
    )
    expect(page.locator(".pair")).to_be_visible()
    page.unroute(SUMMARY)
    page.get_by_label("Figures of", exact=True).select_option(label="the last hour")
    expect(alert).to_be_hidden()


def test_it_asks_again_only_while_it_is_open_and_seen(pages):
    page = pages.open("ab")
    page.clock.install()
    page.reload()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.get_by_role("button", name="Use key").click()
    expect(page.locator(".pair")).to_be_visible()
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "/ab/summary" in request.url else None)

    def passes(milliseconds):
        page.clock.run_for(milliseconds)
        page.wait_for_load_state("networkidle")

    with page.expect_response(SUMMARY):
        passes(REFRESH_MS + 100)
    before = len(asked)
    assert before
    page.evaluate("() => Object.defineProperty(document, 'hidden', { value: true, configurable: true })")
    passes(3 * REFRESH_MS)
    assert len(asked) == before, "nobody sees it"
    page.evaluate("() => delete document.hidden")
    with page.expect_response(SUMMARY):
        page.evaluate("() => document.dispatchEvent(new Event('visibilitychange'))")
    page.get_by_role("link", name="Memory", exact=True).click()
    before = len(asked)
    passes(3 * REFRESH_MS)
    assert len(asked) == before, "another tab is open"
    with page.expect_response(SUMMARY):
        page.get_by_role("link", name="A/B", exact=True).click()


def test_nothing_moves_when_figures_are_read_again(pages, lab):
    page = opened(pages)

    def boxes():
        return page.evaluate(
            """() => [...document.querySelectorAll("#tab-ab section, #tab-ab figure")].map(
                (node) => `${node.offsetTop} ${node.offsetHeight}`)"""
        )

    code = page.locator(".share code").first
    code.evaluate("(node) => node.classList.add('mine')")
    before = boxes()
    lab.complete(model="gdn", prompt="One more", max_tokens=18, user="user-0")
    poll(lambda: not outstanding(lab), "its shadow is over")
    again(page)
    again(page)
    row = page.locator(".did tr", has_text=re.compile("^Tokens generated")).locator("td").first
    tokens = summary_of(lab)["variants"]["dense"]["completion_tokens"]
    expect(row).to_have_text(str(tokens))
    assert boxes() == before


def test_charts_are_read_with_the_keyboard(pages, lab):
    page = opened(pages)
    chart = page.get_by_role("slider", name="Requests over time")
    chart.focus()
    page.keyboard.press("End")
    expect(chart).to_have_attribute("aria-valuenow", "60")
    page.keyboard.press("ArrowLeft")
    expect(chart).to_have_attribute("aria-valuenow", "59")
    page.keyboard.press("Home")
    expect(chart).to_have_attribute("aria-valuenow", "1")
    # As the runs of the compare tab, whatever the browser's locale: 24 hours, two digits each.
    expect(chart).to_have_attribute(
        "aria-valuetext", re.compile(r"^\d\d:\d\d to \d\d:\d\d: dense 0, reduced 0$")
    )
    expect(page.locator(".stamp")).to_have_text(re.compile(r"^as of \d\d:\d\d:\d\d$"))
    expect(page.locator(".timeline")).to_contain_text("A part is 1 minute long.")
    distance = page.get_by_role("slider", name="Distance of predictions (KL) over time")
    expect(distance).to_have_attribute("aria-valuenow", "1")
    distance.focus()
    page.keyboard.press("End")
    expect(distance).to_have_attribute("aria-valuetext", re.compile(r"95 % interval \d"))
    page.mouse.move(0, 0)
    box = chart.bounding_box()
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 40)
    expect(chart).to_have_attribute("aria-valuenow", re.compile("^(27|28|29|30)$"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_sideways_scrolling_and_has_contrast(pages, scheme):
    page = opened(pages, width=360, height=740, color_scheme=scheme)
    seen, low = low_contrast(page)
    assert seen > 40 and not low
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    stub(page, nothing)
    again(page)
    expect(page.get_by_text("No alias is set")).to_be_visible()
    assert page.evaluate("() => document.documentElement.scrollWidth") == 360
