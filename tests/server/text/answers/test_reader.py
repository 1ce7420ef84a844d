"""Thoughts, content and calls are the same however the text is cut, and all of the text is in them."""

import json
import re
from typing import get_args

import pytest
from answers import message, read, reader, written
from hypothesis import example, given
from hypothesis import strategies as st
from templates import TEMPLATES

from server.settings import ReasoningParser, ToolCallParser
from server.text.answers.formats import (
    CALL_FORMATS,
    REASONING_FORMATS,
    call_format_in,
    reasoning_format_in,
    takes_tools,
)
from server.text.answers.parts import Arguments, Call, Content
from server.text.answers.reader import Thinking

FORMATS = ["qwen3_coder", "hermes", "olmo3"]

OPENING = ["<think>", "<tool_call>", "<function_calls>", "<parameter=city>", "<parameter=days>"]
FUNCTIONS = ["<function=now>", "<function=get_weather>", "<function=other>"]
CLOSING = ["</think>", "</tool_call>", "</function_calls>", "</function>", "</parameter>"]
PIECES = [
    *(*OPENING, *FUNCTIONS, *CLOSING),
    *('{"name": "get_weather", "arguments": {', '{"name": "now", "arguments": {}}', '"city": "', '"', "}"),
    *(
        '{"arguments": {"city": "x"}, "name": "get_weather"}',
        "{",
        "[",
        "]",
        "\\",
        "'",
        "get_weather(",
        "now()",
    ),
    *(
        "city=",
        "days=",
        ")",
        "(",
        ", ",
        "\n",
        "\n\n",
        " ",
        "a",
        "bc",
        "1",
        "23",
        "<",
        ">",
        "</",
        "é",
        "漢",
        "<tool",
    ),
]
"""What texts are made of that look like calls: whole calls, pieces of them, and anything else."""


WRITTEN = [
    written(name, made)
    for name in FORMATS
    for made in ([("get_weather", {"city": "abc", "days": 7})], [("now", {}), ("get_weather", {"city": "d"})])
]
"""Good calls."""


@st.composite
def texts(draw, pieces):
    """Texts of such pieces, and calls with such pieces somewhere in them or with something missing."""
    drawn = st.lists(st.sampled_from(pieces), max_size=8).map("".join)
    if draw(st.booleans()):
        return draw(drawn) + draw(drawn) + draw(drawn)
    call = draw(st.sampled_from(WRITTEN))
    cuts = sorted(draw(st.tuples(*[st.integers(0, len(call))] * 2)))
    kept = call[cuts[draw(st.booleans())] :]
    return draw(drawn) + call[: cuts[0]] + draw(drawn) + kept + draw(drawn)


plain = st.text("ab <>/\n\"'\\{}é", max_size=12)


@st.composite
def calls(draw):
    """Calls whose arguments fit the tools' schemas."""
    if draw(st.booleans()):
        return "now", {}
    arguments = {"city": draw(plain)}
    optional = {"days": st.integers(-99, 99), "units": st.sampled_from("CF")}
    optional["tags"] = st.lists(plain, max_size=2)
    for name, values in optional.items():
        if draw(st.booleans()):
            arguments[name] = draw(values)
    return "get_weather", arguments


def cut(text, places):
    """The text in pieces that end at these places, whichever of them it has."""
    ends = sorted({place % (len(text) + 1) for place in places} | {len(text)})
    return [text[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]


@pytest.mark.parametrize("thinking", Thinking)
@pytest.mark.parametrize("name", [*FORMATS, None])
@given(text=texts(PIECES), places=st.lists(st.integers(0, 400), max_size=40))
def test_the_cuts_change_nothing(name, thinking, text, places):
    whole = message(read(reader(name, thinking), [text]))
    for pieces in (cut(text, places), list(text)):
        for each in (True, False):
            assert message(read(reader(name, thinking), pieces, each=each)) == whole


def letters(text):
    """What a text says, without the words and the punctuation of the formats, in order."""
    text = re.sub(r"</?(think|tool_call|function_calls|function|parameter)\b", "", text)
    text = re.sub(r"</\w*$", "", text)  # the beginning of a closing tag
    return re.sub(r"arguments|name|\\n|[\s{}\[\]()<>/\"',:=]", "", text)


def told(parts):
    """All that was told of an answer, in the order in which it was."""
    return "".join(part.name if isinstance(part, Call) else part.text for part in parts)


@pytest.mark.parametrize("name", FORMATS)
@given(text=texts([piece for piece in PIECES if "arguments" not in piece and piece != "\\"]))
@example(text="<tool_call>\n<function=now>\n</function>\n</tool_call>a<tool_call>")
@example(text="<function_calls>now()\nget_weather(city=bc)\nnow()</function_calls>23")
def test_nothing_is_lost(name, text):
    assert letters(told(read(reader(name, Thinking.MAYBE), list(text)))) == letters(text)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("junk", ["z", "<", "\n", " z y", "<z", "</tool_call>", "<function=now>"])
def test_nothing_is_lost_wherever_it_is(name, junk):
    for call in WRITTEN:
        for at in range(len(call) + 1):
            text = call[:at] + junk + call[at:]
            whole = read(reader(name), [text])
            assert letters(told(whole)) == letters(text), text
            assert message(read(reader(name), list(text))) == message(whole), text
            assert letters(told(read(reader(name), [call[:at]]))) == letters(call[:at]), "cut there"


@pytest.mark.parametrize("name", FORMATS)
@given(
    made=st.lists(calls(), min_size=1, max_size=3),
    before=st.text("ab \n", max_size=8),
    thought=st.text("xy \n", max_size=8),
)
def test_what_models_write_is_read(name, made, before, thought):
    text = f"{thought}\n</think>\n\n{before}\n\n{written(name, made)}\n"
    read_back = message(read(reader(name, Thinking.OPEN), list(text)))
    assert read_back["reasoning"] == thought.strip() and read_back["content"] == before.strip()
    assert [(call["name"], json.loads(call["arguments"])) for call in read_back["calls"]] == made


@pytest.mark.parametrize("name", FORMATS)
def test_the_name_comes_first_and_then_the_arguments(name):
    text = written(name, [("get_weather", {"city": "Zürich and more", "days": 3}), ("now", {})])
    parts = read(reader(name), list(text))
    first = [part for part in parts if getattr(part, "number", None) == 0]
    assert first[0] == Call(0, "get_weather") and all(isinstance(part, Arguments) for part in first[1:])
    if name != "olmo3":
        assert len(first) > 10, "as they come"
    assert [part.name for part in parts if isinstance(part, Call)] == ["get_weather", "now"]


NO_CALLS = {
    "qwen3_coder": [
        "<tool_call>",
        "<tool_call>\n<function=other>\n</function>\n</tool_call>",
        "<tool_call>\n<function=now>\nwhat?\n</function>\n</tool_call>",
        "<tool_call>\n<function=now",
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
        "<tool_call><tool_call>",
    ],
    "hermes": [
        "<tool_call>\nnow()\n</tool_call>",
        '<tool_call>\n{"name": "other", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": []}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": "{"}\n</tool_call>',
        "<tool_call>\n{'name': 'now', 'arguments': {}}\n</tool_call>",
        '<tool_call>\n{"name": "now", "argu',
        '<tool_call>\n{"name": 5}\n</tool_call>',
        '<tool_call>\n[{"name": "now"}]\n</tool_call>',
    ],
    "olmo3": [
        "<function_calls>other()</function_calls>",
        "<function_calls>get_weather(city=Bern)</function_calls>",
        '<function_calls>get_weather(city="Bern"',
        "<function_calls>now( <b> )</function_calls>",
        "<function_calls></function_calls>",
        "<function_calls>get_weather(city=(1, [2))</function_calls>",
        "<function_calls>get_weather('Bern')</function_calls>",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, own in NO_CALLS.items() for text in own])
def test_what_is_no_call_is_content(name, text):
    content = f"Look: {text}"
    assert message(read(reader(name), [content])) == {"content": content, "reasoning": "", "calls": []}


def test_a_call_that_is_cut_stays_one():
    answer = reader("qwen3_coder")
    parts = read(answer, ["<tool_call>\n<function=get_weather>\n<parameter=city>\nBern\n</para"])
    assert message(parts)["calls"] == [{"name": "get_weather", "arguments": '{"city": "Bern\\n</para'}]
    assert not answer.called
    answer = reader("hermes")
    parts = read(answer, ['<tool_call>\n{"name": "get_weather", "arguments": {"city": "Be'])
    assert message(parts)["calls"] == [{"name": "get_weather", "arguments": '{"city": "Be'}]
    assert not answer.called


def test_a_value_may_have_the_closing_tag_in_it():
    value = "a</parameter>\n<b>\n</parameter>\n<parameter=city>\nc\n</function>"
    made = {"city": value, "days": 2}
    parts = read(reader("qwen3_coder"), [written("qwen3_coder", [("get_weather", made)])])
    assert json.loads(message(parts)["calls"][0]["arguments"]) == made


def test_other_ways_to_write_a_call():
    forms = {
        "hermes": [
            '<tool_call>{"arguments": {"city": "x}"}, "name": "get_weather"}</tool_call>',
            '<tool_call>{"name":"get_weather","parameters":{"city":"x}"}}',
            '<tool_call>\n{"name": "get_weather", "arguments": "{\\"city\\": \\"x}\\"}"}\n</tool_call>',
        ],
        "olmo3": [
            "<function_calls>\nget_weather(city='x}')\n</function_calls>",
            '<function_calls>get_weather( city = "x}", )</function_calls>',
        ],
        "qwen3_coder": [
            "<tool_call><function=get_weather><parameter=city>x}</parameter></function></tool_call>",
            "<tool_call>\n<function=get_weather>\n<parameter=city>\nx}\n</parameter>\n</function>",
        ],
    }
    for name, own in forms.items():
        for text in own:
            (call,) = message(read(reader(name), list(text)))["calls"]
            assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "x}"}), text
    two = "<tool_call>\n<function=now>\n</function>\n<function=now>\n</function>\n</tool_call>"
    assert len(message(read(reader("qwen3_coder"), [two]))["calls"]) == 2


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_only(name):
    text = written(name, [("get_weather", {"city": "Bern"}), ("now", {})])
    for pieces in ([text], list(text)):
        answer = reader(name, parallel=False)
        parts = read(answer, pieces)
        assert [call["name"] for call in message(parts)["calls"]] == ["get_weather"]
        assert answer.done and answer.called and message(parts)["content"] == ""


def test_thoughts():
    def of(text, thinking, name=None):
        read_back = message(read(reader(name, thinking), list(text)))
        return read_back["reasoning"], read_back["content"]

    assert of("hm\n</think>\n\nYes", Thinking.OPEN) == ("hm", "Yes")
    assert of("<think>\nhm\n</think>\n\nYes", Thinking.MAYBE) == ("hm", "Yes")
    assert of("\n<think>hm", Thinking.MAYBE) == ("hm", "")
    assert of("hm ", Thinking.OPEN) == ("hm ", "")
    assert of(" Yes <think>no</think>", Thinking.MAYBE) == ("", " Yes <think>no</think>")
    assert of("<think>no</think>", Thinking.NEVER) == ("", "<think>no</think>")
    assert of("a</think>b</think>c", Thinking.OPEN) == ("a", "b</think>c")
    assert of("<thin", Thinking.MAYBE) == ("", "<thin")
    # A call ends thoughts, which models forget to close.
    text = "I ask.\n" + written("qwen3_coder", [("now", {})]) + "\nSo."
    assert of(text, Thinking.OPEN, "qwen3_coder") == ("I ask.", "So.")
    # One that is none does not.
    assert of("<tool_call>?</think>Yes", Thinking.OPEN, "qwen3_coder") == ("<tool_call>?", "Yes")


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>" * 20_000,
        "<function_calls>" * 20_000,
        '<tool_call>{"' * 20_000,
        '<function_calls>now("' * 20_000,
        "<function_calls>now('\"" * 20_000,
        "<tool_call>\n<function=get_weather>\n<parameter=city>\n" + "</parameter>" * 20_000,
        "<tool_call>\n<function=get_weather>\n<parameter=tags>\n"
        + "[" * 100_000
        + "\n</parameter>\n</function>",
        '<tool_call>{"name": "get_weather", "x": ' + "[" * 100_000 + "]" * 100_000 + "}",
        "<function_calls>get_weather(city=" + "[" * 100_000 + "]" * 100_000 + ")",
        "\n" * 100_000,
    ],
    ids=lambda text: repr(text[:24]),
)
def test_no_text_is_too_much(name, text):
    """Nested or repeated without end, a text is read all the same. Quadratic work would take minutes here."""
    answer = reader(name)
    parts = read(answer, [text[at : at + 7] for at in range(0, len(text), 7)])
    assert len(told(parts)) + 100 >= len(text.strip()) or answer.called


def test_templates_tell_the_format():
    for name, template in TEMPLATES.items():
        assert call_format_in(template) == name and takes_tools(template)
    assert call_format_in("<tools>") is None and not takes_tools("{{ toolset }}")
    assert [reasoning_format_in(TEMPLATES[name]) for name in FORMATS] == ["qwen3", "qwen3", None]
    assert reasoning_format_in("<think><function_calls>") == "olmo3"


def test_settings_name_each_format():
    assert get_args(ToolCallParser) == ("auto", "none", *CALL_FORMATS)
    assert get_args(ReasoningParser) == ("auto", "none", *REASONING_FORMATS)


def test_white_space_without_end_is_not_held_back_for_thoughts():
    held = reader(None, Thinking.MAYBE)
    for _ in range(33):
        held.add("\n")
    assert held.take() == [Content("\n" * 33)]
    for said, thoughts in (("\n" * 32 + "<think>hm", "hm"), ("\n" * 33 + "<think>hm", "")):
        for pieces in ([said], list(said)):
            assert message(read(reader(None, Thinking.MAYBE), pieces))["reasoning"] == thoughts
