"""Chat on the compare tab: messages by the model's template, thinking apart from the answer, and the turn after."""

import json

import pytest

pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
from browser import CHROMIUM
from compare_page import answer_with, card, evaluate, history, press, run, settings, start
from playwright.sync_api import expect

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")


def message(page, text):
    page.get_by_label("Message", exact=True).fill(text)


def rendered(lab, messages):
    return lab.http.post("/tokenize", json={"messages": messages}).json()["tokens"]


def test_messages_are_compared_as_the_template_writes_them(open_page, lab):
    page = open_page()
    sent = answer_with(page, [1.0] * 2)
    expect(page.get_by_role("radio", name="Chat")).to_be_checked()
    message(page, "Who are you?")
    settings(page, max_tokens=12)
    run(page)
    first = [{"role": "user", "content": "Who are you?"}]
    assert sent[0]["prompt"] == sent[1]["prompt"] == rendered(lab, first)
    expect(history(page).first).to_contain_text("chat, 12 tokens")
    answer = card(page, "dense").locator(".text").inner_text()
    press(page, "Reply")
    expect(page.locator("#turns li")).to_have_count(2)
    expect(page.locator("#turns li").last).to_contain_text("assistant: dense")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    message(page, "And why?")
    page.get_by_label("System message").fill("Be brief.")
    run(page)
    expect(history(page)).to_have_count(3)
    turns = [{"role": "assistant", "content": answer}, {"role": "user", "content": "And why?"}]
    system = [{"role": "system", "content": "Be brief."}]
    assert sent[2]["prompt"] == rendered(lab, [*system, *first, *turns])
    # The first message comes back without what followed it.
    history(page).nth(1).get_by_role("button").click()
    expect(page.get_by_label("Message", exact=True)).to_have_value("Who are you?")
    expect(page.locator("#thread")).to_be_hidden()
    history(page).nth(0).get_by_role("button").click()
    expect(page.locator("#turns li")).to_have_count(2)
    press(page, "New chat")
    expect(page.locator("#thread")).to_be_hidden()
    # The recorded run is one of text.
    history(page).nth(2).get_by_role("button").click()
    expect(page.get_by_role("radio", name="Text")).to_be_checked()
    expect(page.get_by_label("System message")).to_be_hidden()
    expect(page.get_by_role("button", name="Reply")).to_be_hidden()


def test_a_model_without_a_template_is_asked_for_text(open_page):
    def without(route):
        told = route.fetch().json()
        for model in told["data"]:
            model["lowkey"]["chat_template"] = False
        route.fulfill(json=told)

    page = open_page(key="")
    page.route("**/v1/models", without)
    page.get_by_label("Key", exact=True).fill("browser-0123456789abcdef")
    page.get_by_role("button", name="Use key").click()
    expect(page.get_by_role("checkbox", name="dense")).to_be_checked()
    expect(page.get_by_role("radio", name="Chat")).to_be_hidden()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(
        'import os\n\n\ndef read_lines(path):\n    """Return the lines of a file."""\n'
    )


def test_a_template_that_refuses_is_quoted(open_page):
    page = open_page()
    page.route(
        "**/tokenize",
        lambda route: route.fulfill(
            status=400, json={"error": {"message": "messages: no role x", "code": 400}}
        ),
    )
    message(page, "Hello")
    start(page)
    expect(page.get_by_role("alert")).to_have_text("Messages: no role x")
    expect(page.locator("#recorded")).to_be_visible()


@pytest.mark.parametrize("choice", ["", "on", "off"])
def test_thinking_can_be_turned_on_and_off(open_page, choice):
    page = open_page()
    asked = []

    def note(route):
        asked.append(route.request.post_data_json)
        route.continue_()

    page.route("**/tokenize", note)
    message(page, "Hello")
    settings(page, max_tokens=3)
    page.get_by_label("Thinking").select_option(choice)
    run(page)
    given = {"": None, "on": {"enable_thinking": True}, "off": {"enable_thinking": False}}[choice]
    assert [body["chat_template_kwargs"] for body in asked] == [given]


def test_thinking_is_folded_away_and_no_part_of_the_reply(open_page):
    """Both think, since their prompt ended so, and part while they do; one of them does not come to an answer."""
    page = open_page()
    open_thinking = {
        "count": 3,
        "max_model_len": 99,
        "tokens": [1, 2, 3],
        "token_strs": ["<user>Hi", "<think>", "\n"],
    }
    page.route("**/tokenize", lambda route: route.fulfill(json=open_thinking))
    texts = {
        "dense": ["I should", " greet.", "</think>", "\n\n", "Hello!"],
        "reduced": ["I should", " wait."],
    }

    def answer(route):
        def result(variant):
            tokens = texts[variant]
            kl = {
                "kl": [0.1] * 5,
                "agree": [True] * 5,
                "mean_kl": 0.1,
                "top1_agreement": 1.0,
                "first_divergence": 1,
            }
            difference = {**kl, "state_bytes_ratio": 0.5, "tokens_per_second_ratio": 1.0}
            speeds = {"ttft_s": 0.01, "decode_s": 0.1, "tokens_per_second": 50.0}
            return {
                "variant": variant,
                "text": "".join(tokens),
                "tokens": tokens,
                "finish_reason": "stop",
                "usage": {"completion_tokens": len(tokens)},
                "lowkey": {**speeds, "state_bytes": 8, "state_dtype": "int8"},
                "prompt_perplexity": 3.0,
                "against_baseline": None if variant == "dense" else difference,
            }

        whole = {"object": "compare", "results": [result("dense"), result("reduced")]}
        route.fulfill(body=f"data: {json.dumps(whole)}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    page.route("**/v1/compare", answer)
    message(page, "Hi")
    run(page)
    dense, reduced = card(page, "dense"), card(page, "reduced")
    expect(dense.get_by_text("I should greet.")).to_be_hidden()
    assert dense.locator(".text").inner_text().endswith("Hello!")
    for shown in (dense, reduced):
        expect(shown.locator("summary")).to_have_text("What it thought; the answers part in it")
    reduced.locator("summary").press("Enter")
    expect(reduced.get_by_text("I should wait.")).to_be_visible()
    expect(reduced.locator(".thinking .after")).to_have_text(" wait.")
    expect(page.locator(".card")).not_to_contain_text(["think>", "think>"])
    press(page, "Reply")
    assert page.locator("#turns li").all_inner_texts() == ["user\nHi", "assistant: dense\nHello!"]


@pytest.mark.parametrize(
    ("text", "is_open", "answer"),
    [
        ("Hello", False, "Hello"),
        ("<think>\nHm.\n</think>\n\nHello", False, "Hello"),
        ("\n<think>Hm", False, ""),
        ("Hm.</think>Hello", True, "Hello"),
        ("Hm", True, ""),
        ("To say </think> is fine", False, "To say </think> is fine"),
        ("a</think>b</think>c", True, "b</think>c"),
    ],
)
def test_an_answer_begins_where_thinking_ends(open_page, text, is_open, answer):
    page = open_page()
    assert evaluate(page, "text.js", "args[0].slice(m.answerStart(...args))", text, is_open) == answer


@pytest.mark.parametrize(
    "text", ["<think>\nHm. So\n</think>\n\nHello", "\n<think>Hm. So", "Hm. So</think>Hello", "Hm. So\n\n"]
)
def test_a_thought_is_shown_without_its_tags(open_page, text):
    page = open_page()
    thought = "args[0].slice(...m.thoughtSpan(args[0], m.answerStart(args[0], true)))"
    assert evaluate(page, "text.js", thought, text) == "Hm. So"


@pytest.mark.parametrize(
    ("tokens", "is_open"),
    [
        (["<|im_start|>", "assistant", "\u010a", "<think>", "\u010a"], True),
        (["<think>", "\u010a", "</think>", "\u010a"], False),
        (["<", "think", ">"], True),
        (["<think>", "a", "</think>", "b", "<think>"], True),
        (["assistant"], False),
    ],
)
def test_a_prompt_tells_whether_it_ends_within_thinking(open_page, tokens, is_open):
    page = open_page()
    assert evaluate(page, "text.js", "m.leavesThinkingOpen(args[0])", tokens) is is_open
