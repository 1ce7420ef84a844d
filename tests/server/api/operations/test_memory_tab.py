"""The memory tab in a real Chromium: what it says fits is what the engine's own plan gives."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
from browser import CHROMIUM, Pages
from contrast import low_contrast
from engine_process import engine_config
from fake_device import FakeDevice
from hybrid_cases import CASES
from hybrids import write_hybrid
from live_server import LiveServer
from playwright.sync_api import expect
from reducing import random_keep, reduce

from modeling.checkpoint import open_checkpoint
from modeling.spec import STATE_DTYPES, StateTypes
from modeling.state import page_bytes
from pruning.capacity import requests_that_fit, served
from server.engine.memory import RESERVED, DoesNotFitError, Needs, Room, plan_memory, weights_of

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
DEMO = Path(__file__).parents[4] / "demo"
FIXTURES = ("vl-dense-bf16", "text-dense-odd-irregular", "vl-moe-each")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The demo's hybrid, and halves of it and of the demo's model of linear attention alone."""
    directory = tmp_path_factory.mktemp("checkpoints")
    for name in ("model", "hybrid"):
        checkpoint = open_checkpoint(str(DEMO / name))
        widths = [d_k // 2 for d_k in checkpoint.spec.d_k]
        reduce(checkpoint, random_keep(checkpoint.spec, widths), directory / name)
    return {"hybrid": DEMO / "hybrid", "half": directory / "hybrid", "linear": directory / "model"}


@pytest.fixture(scope="module")
def lab(checkpoints, tmp_path_factory):
    """A server whose second variant is reduced, and narrow besides; the third one's dense model is not served."""
    directory = tmp_path_factory.mktemp("memory")
    (directory / "lowkey.toml").write_text(
        f'max_requests = 6\n[variants]\nhybrid = "{checkpoints["hybrid"]}"\nlinear = "{checkpoints["linear"]}"\n'
        f'[variants.half]\nsource = "{checkpoints["half"]}"\nstate_dtype = "int8"\n'
        "[aliases]\nboth = {hybrid = 1, half = 1}\n"
    )
    server = LiveServer(
        directory / "log", "--config", str(directory / "lowkey.toml"), LOWKEY_CONTEXT_TOKENS="1000"
    )
    try:
        yield server.wait_ready("hybrid", "half", "linear")
    finally:
        server.stop()


@pytest.fixture
def pages(browser, lab):
    """Pages of the server; at the end nothing may have gone wrong in them."""
    pages = Pages(browser, lab.url)
    yield pages
    pages.close()
    assert not pages.wrong


@pytest.fixture
def tab(pages):
    return opened(pages)


def opened(pages, **options):
    page = pages.open("memory", **options)
    expect(page.locator(".fits")).to_be_visible()
    return page


def spec_of(path):
    return open_checkpoint(str(path)).spec


def dense_of(path):
    """The spec of the demo's linear model before it was halved."""
    spec = spec_of(path)
    return spec.with_d_k(tuple(2 * d_k for d_k in spec.d_k))


def room(spec, dtype, tokens, weights=torch.float32):
    types = StateTypes.named(dtype, weights)
    return Room(spec.state_bytes(0, types), page_bytes(spec, types), tokens)


def fitting(room, memory):
    """Requests of the room's length in a pool of so many bytes."""
    slots, pages = room.split(memory)
    return slots if pages >= room.pages else 0


def rows(page):
    """Requests by title and dtype, as the table has them."""
    return page.evaluate(
        """() => Object.fromEntries([...document.querySelectorAll(".fits tbody")].map((body) => [
            body.querySelector("b").textContent,
            Object.fromEntries([...body.querySelectorAll("tr:not(.group)")].map((row) => [
                row.querySelector("th").firstChild.textContent,
                row.querySelector("td").textContent,
            ])),
        ]))"""
    )


def set_memory(page, text):
    page.get_by_role("textbox", name="Memory").fill(text)


def set_tokens(page, tokens):
    exact = page.get_by_label("Tokens of one request, exactly")
    exact.fill(str(tokens))
    exact.press("Tab")


def call(page, function, arguments):
    """What a function of the page's arithmetic gives for each list of arguments."""
    return page.evaluate(
        """async ([name, all]) => {
            const plan = await import(new URL("plan.js", document.querySelector("script[type=module]").src));
            return all.map((each) => plan[name](...each));
        }""",
        [function, arguments],
    )


def test_the_arithmetic_is_the_engines_to_the_request(tab, tmp_path):
    specs = [spec_of(DEMO / "model"), spec_of(DEMO / "hybrid")]
    specs += [spec_of(write_hybrid(tmp_path / name, CASES[name])) for name in FIXTURES]
    asked, expected = [], []
    for spec in specs:
        for dtype in STATE_DTYPES:
            for tokens in (1, 64, 65, 1000, 4096, 262_144):
                its = room(spec, dtype, tokens)
                least, request = its.least, its.request
                for memory in (
                    least - 1,
                    least,
                    its.size(0, 0) + request - 1,
                    its.size(0, 0) + request,
                    its.size(0, 0) + 7 * request - 1,
                    its.size(0, 0) + 7 * request,
                    2**30,
                    80 * 10**9,
                    2**49 + 12_345,
                ):
                    bytes_ = {"state_bytes": its.bytes_per_slot, "kv_bytes_per_page": its.bytes_per_page}
                    asked.append([memory, bytes_, tokens])
                    expected.append((its.split(memory), fitting(its, memory)))
    split = call(tab, "split", asked)
    assert [(found["slots"], found["pages"]) for found in split] == [both for both, _ in expected]
    assert call(tab, "requestsThatFit", asked) == [count for _, count in expected]
    assert {min(count, 2) for _, count in expected} == {0, 1, 2}


def test_it_is_the_arithmetic_of_the_reports_but_for_what_belongs_to_nobody(tab):
    """Reports of `lowkey-prune` count no slot and page that nobody has."""
    for spec in (spec_of(DEMO / "model"), spec_of(DEMO / "hybrid")):
        its = {tokens: room(spec, "float32", tokens, torch.bfloat16) for tokens in (64, 4096, 16_384)}
        bytes_ = {"state_bytes": its[64].bytes_per_slot, "kv_bytes_per_page": its[64].bytes_per_page}
        lefts = [10**8, 10**9, 12_345_678_901]
        asked = [[left + its[64].size(0, 0), bytes_, tokens] for tokens in its for left in lefts]
        expected = [requests_that_fit(spec, tokens, left) for tokens in its for left in lefts]
        assert call(tab, "requestsThatFit", asked) == expected
        assert its[64].bytes_per_slot == spec.state_bytes(0, served())


def test_sizes_as_people_type_them(tab):
    sizes = {
        "1 GiB": 2**30, "1.5gib": 3 * 2**29, "80 GB": 80 * 10**9, "0,5 TB": 5 * 10**11, " 7 B ": 7,
        "61.677568 MB": 61_677_568, "64": None, "GB": None, "-1 GB": None, "1e9 B": None, "0 GB": None,
        "99999999 TB": None, "1 XB": None, "": None,
    }  # fmt: skip
    assert call(tab, "parseBytes", [[text] for text in sizes]) == list(sizes.values())


def test_the_table_is_what_engines_would_plan(tab, checkpoints):
    specs = {name: spec_of(path) for name, path in checkpoints.items()}
    specs["the dense original of linear"] = dense_of(checkpoints["linear"])
    for memory, tokens in (("1 GiB", 1000), ("250 MB", 64), ("80 GB", 2048), ("9 MB", 2000)):
        set_memory(tab, memory)
        set_tokens(tab, tokens)
        size = {"1 GiB": 2**30, "250 MB": 250 * 10**6, "80 GB": 80 * 10**9, "9 MB": 9 * 10**6}[memory]
        expected = {}
        for name, spec in specs.items():
            expected[name] = {}
            for dtype in STATE_DTYPES:
                its = room(spec, dtype, tokens)
                try:
                    plan = plan_memory(
                        engine_config("x", state_memory=size, context_tokens=tokens),
                        FakeDevice(total=2**60),
                        Needs(0),
                        its.bytes_per_slot,
                        its.bytes_per_page,
                        context_length=spec.context_length,
                    )
                    count = plan.slots if plan.pages >= plan.room.pages else 0
                except DoesNotFitError:
                    count = 0
                expected[name][dtype] = f"{count:,}"
        assert rows(tab) == expected, (memory, tokens)
    titles = [title.text_content() for title in tab.locator(".fits .group b").all()]
    assert titles == ["hybrid", "the dense original of linear", "linear", "half"], "dense ones first"
    here = tab.locator(".fits tr", has=tab.get_by_text("served here"))
    assert [row.locator("th").evaluate("th => th.firstChild.textContent") for row in here.all()] == [
        "float32",
        "float32",
        "int8",
    ]


def test_at_first_it_shows_this_servers_own_plan(tab, lab):
    told = {model["id"]: model["lowkey"] for model in lab.http.get("/v1/models").json()["data"]}
    hybrid = told["hybrid"]
    assert tab.get_by_label("Tokens of one request, exactly").input_value() == "1000"
    memory = hybrid["memory"]["states"] + hybrid["memory"]["pages"]
    expect(tab.locator("#plan-memory-hint")).to_contain_text(f"{memory:,} bytes")
    assert rows(tab)["hybrid"]["float32"] == str(hybrid["slots"]) == "6"
    own = rows(tab)
    size = tab.get_by_role("textbox", name="Memory")
    expect(size).to_have_value(f"{memory / 1e6:.1f} MB")
    tab.get_by_role("button", name="1 GiB").click()
    assert rows(tab) != own
    tab.get_by_role("button", name="as here").click()
    expect(tab.locator("#plan-memory-hint")).to_contain_text(f"{memory:,} bytes")
    assert rows(tab) == own, "of all its bytes, though a rounded number is shown"
    for name in ("hybrid", "half", "linear"):
        now = tab.locator(f".variant-now[data-variant={name}]")
        expect(now).to_contain_text("Room for 6 requests of 1,000 tokens at once (6 slots")
    set_tokens(tab, 2048)
    pages = hybrid["pages"]
    expect(tab.locator(".variant-now[data-variant=hybrid]")).to_contain_text(
        f"Room for {pages // 32} requests of 2,048 tokens at once (6 slots and {pages} pages"
    )
    expect(tab.locator(".variant-now[data-variant=linear]")).to_contain_text("Room for 6 requests of 2,048")
    expect(tab.locator("code", has_text="lowkey-prune inspect")).to_be_visible()


def test_a_whole_gpu_is_what_an_engine_there_would_plan(tab, checkpoints):
    set_memory(tab, "24 GB")
    set_tokens(tab, 2048)
    tab.get_by_label("a whole GPU").check()
    seen = rows(tab)
    for name, path in checkpoints.items():
        checkpoint = open_checkpoint(str(path))
        needs = Needs(weights_of(checkpoint, torch.bfloat16), reserved=RESERVED)
        for dtype in STATE_DTYPES:
            its = room(checkpoint.spec, dtype, 2048, torch.bfloat16)
            plan = plan_memory(
                engine_config("x", device_memory=0.9),
                FakeDevice(total=24 * 10**9),
                needs,
                its.bytes_per_slot,
                its.bytes_per_page,
                context_length=checkpoint.spec.context_length,
            )
            assert seen[name][dtype] == f"{plan.slots:,}", (name, dtype)
    set_memory(tab, "1 GB")
    expect(tab.locator(".lead")).to_contain_text("too little for the weights")
    assert set(rows(tab)["half"].values()) == {"0"}


def test_a_size_that_is_none_is_said_so_and_the_figures_stay(tab):
    set_memory(tab, "1 GiB")
    before = rows(tab)
    set_memory(tab, "lots")
    hint = tab.locator("#plan-memory-hint")
    expect(hint).to_have_text("“lots” is no size. Type a number and a unit, such as 1 GiB or 80 GB.")
    expect(tab.get_by_role("textbox", name="Memory")).to_have_attribute("aria-invalid", "true")
    assert rows(tab) == before
    tab.get_by_role("button", name="16 GiB").click()
    expect(hint).to_contain_text(f"{2**34:,} bytes")
    assert rows(tab) != before


def test_lengths_are_dragged_and_moved_with_the_keyboard(tab):
    exact = tab.get_by_label("Tokens of one request, exactly")
    slider = tab.get_by_role("slider")
    slider.focus()
    tab.keyboard.press("End")
    expect(exact).to_have_value("2048")
    expect(slider).to_have_attribute("aria-valuetext", "2,048 tokens")
    longest = rows(tab)["hybrid"]
    tab.keyboard.press("Home")
    expect(exact).to_have_value("64")
    shortest = rows(tab)["hybrid"]
    assert int(shortest["float32"]) > int(longest["float32"])
    assert rows(tab)["linear"]["int8"].replace(",", "").isdigit()
    chart = tab.locator("svg.capacity")
    chart.scroll_into_view_if_needed()
    box = chart.bounding_box()
    tab.mouse.move(box["x"] + 60, box["y"] + 90)
    tab.mouse.down()
    tab.mouse.move(box["x"] + box["width"] - 2, box["y"] + 90, steps=4)
    tab.mouse.up()
    expect(exact).to_have_value("2048")
    assert rows(tab)["hybrid"] == longest
    set_tokens(tab, 5000)
    expect(exact).to_have_value("2048")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_needs_no_sideways_scrolling_and_has_contrast(pages, scheme):
    page = opened(pages, width=360, height=740, color_scheme=scheme)
    seen, low = low_contrast(page)
    assert seen > 40 and not low
    for memory in ("80 GB", "9 MB", "x"):
        set_memory(page, memory)
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
    table = page.locator(".fits").bounding_box()
    assert table["x"] + table["width"] <= 360


def test_what_is_shown_stays_while_the_server_is_asked_again(tab):
    """The list of models comes every few seconds; a table that is the same is not made anew."""
    tab.evaluate("() => document.querySelector('.fits').classList.add('mine')")
    with tab.expect_response("**/v1/models"):
        pass
    with tab.expect_response("**/v1/models"):
        pass
    expect(tab.locator(".fits.mine")).to_be_visible()


def test_before_any_variant_has_loaded_it_says_so(pages):
    page = pages.open("compare")
    page.route(
        "**/v1/models",
        lambda route: route.fulfill(
            json={"object": "list", "data": [{"id": "dense", "lowkey": {"status": "loading"}}]}
        ),
    )
    page.reload()
    page.get_by_role("link", name="Memory", exact=True).click()
    expect(page.get_by_text("No variant has loaded yet.")).to_be_visible()
    page.unroute("**/v1/models")
    expect(page.locator(".fits")).to_be_visible()
    assert re.fullmatch(r"[\d,]+", rows(page)["half"]["int8"])
