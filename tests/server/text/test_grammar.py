"""Grammars as text: what is written, how they are put together, and what is refused before an engine sees it."""

import asyncio
import json
import subprocess
import sys
import threading

import pytest
from formats import small_tokenizer
from llguidance import LLMatcher, LLTokenizer

from server.text import grammar
from server.text.grammar import GrammarError

TOKENIZER = small_tokenizer("</think>", "<tool_call>", "[END]")
THINK, TOOL, END = (TOKENIZER.token_to_id(text) for text in ("</think>", "<tool_call>", "[END]"))
TOKENS = LLTokenizer(TOKENIZER.to_str(), eos_token=0)


def accepts(text, *parts):
    """Whether the grammar is complete behind these texts and token ids; None if it does not get there."""
    matcher = LLMatcher(TOKENS, text)
    assert not matcher.is_error(), matcher.get_error()
    for part in parts:
        ids = [part] if isinstance(part, int) else TOKENIZER.encode(part, add_special_tokens=False).ids
        if matcher.validate_tokens(ids) < len(ids):
            return None
        assert matcher.consume_tokens(ids)
    return matcher.is_accepting()


def check(text):
    asyncio.run(grammar.check(text))


@pytest.mark.parametrize("text", ['a"b', "é", "a\nb", "a\\b", "\0", "/x/", "<tool>", "%json {}", "\u2028"])
def test_a_choice_is_the_text_letter_by_letter(text):
    assert accepts(grammar.choice([text, "other"]), text)
    assert not accepts(grammar.choice([text + "!", "other"]), text)


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("a/b", "a/b"),
        ("[^/]+", "abc"),
        ("a\nb", "a\nb"),
        ("^ab?$", "a"),
        ("(?i)abc", "aBC"),
        (r"\d+", "12"),
        ("", ""),
    ],
)
def test_a_regex_matches_as_a_whole(pattern, text):
    assert accepts(grammar.regex(pattern), text)
    assert not accepts(grammar.regex(pattern), text + "/")


def test_json():
    schema = {"properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    for text in ('{"a":1}', '{ "a" :  1 }', '{\n    "a": 1\n}'):
        assert accepts(grammar.json_schema({"type": "object", **schema}), text), text
    assert accepts(grammar.json_schema({"type": "object", **schema}, compact=True), '{"a":1}')
    assert accepts(grammar.json_schema({"type": "object", **schema}, compact=True), '{ "a":1}') is None
    assert (
        accepts(grammar.json_object(), '{"x": [1, {"y": null}]}')
        and accepts(grammar.json_object(), "[1]") is None
    )
    lenient = {"not": {}, "x-guidance": {"lenient": True}}
    with pytest.raises(GrammarError, match="not"):
        check(grammar.json_schema(lenient))


def test_a_literal_has_added_tokens_as_tokens():
    assert grammar.literal("ab", TOKENIZER) == '"ab"'
    text = grammar.literal("x<tool_call>\n[END]</think>", TOKENIZER)
    assert text == f'"x" <[{TOOL}]> "\\n" <[{END}]> <[{THINK}]>'
    assert accepts(f"start: {text}", "x", TOOL, "\n", END, THINK)
    assert accepts(f"start: {text}", "x", *TOKENIZER.encode("<").ids) is None, (
        "letters of its name are no token"
    )


def test_the_longest_added_token_is_taken():
    tokenizer = small_tokenizer("<a", "<a>")
    assert grammar.literal("<a>", tokenizer) == f"<[{tokenizer.token_to_id('<a>')}]>"


@pytest.mark.parametrize(
    "behind",
    [
        grammar.json_schema({"type": "integer"}),
        'start: number\nnumber: "12" | "1"',
        'start: A\nA: /[0-9]+/\nB: "not used"',
    ],
)
def test_after_the_end_of_thinking(behind):
    text = grammar.after("</think>", behind, TOKENIZER)
    check(text)
    assert accepts(text, "I think: {12}\n", THINK, "12") and accepts(text, THINK, "\n\n12")
    assert accepts(text, "12") is False, "it has not begun"
    assert accepts(text, "hm", THINK, "\n\n\n12") is None and accepts(text, "hm", THINK, "x") is None
    spelt = grammar.after("</thought>", behind, TOKENIZER)
    assert accepts(spelt, "I </though\n</thought>", "\n12") and accepts(spelt, "I </thought>x") is None
    assert accepts(spelt, "x</thought>12")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (grammar.json_schema({"not": {}}), r'Unimplemented keys: \["not"\]$'),
        (grammar.json_schema({"type": "string", "format": "nope"}), "Unknown format: nope$"),
        (grammar.json_schema([]), "must be an object or boolean"),
        (grammar.json_schema({"type": "integer", "minimum": 5, "maximum": 3}), "greater than maximum"),
        (grammar.regex("a\n(b"), "unclosed group$"),
        ("start: x\nx: nobody", 'line 2: unknown name: "nobody"$'),
        ("", "Empty"),
        ("start: \ud800", "serializable"),
        ("x" * 131_073, "131073 characters"),
    ],
)
def test_what_cannot_be_compiled_is_an_error_of_one_line(text, reason):
    with pytest.raises(GrammarError, match=reason) as error:
        check(text)
    assert "\n" not in str(error.value) and "^" not in str(error.value)


def test_a_reason_that_quotes_the_grammar_is_cut():
    with pytest.raises(GrammarError) as error:
        check(grammar.regex("a" * 5000 + "("))
    assert len(str(error.value)) < 500


LONG = {
    "rules": "\n".join(["start: r0", *(f"r{i}: (((r{i + 1}?)?)?)?" for i in range(4500)), 'r4500: "a"']),
    "definitions": grammar.json_schema(
        {
            "$ref": "#/$defs/0",
            "$defs": {str(i): {"properties": {"": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(2300)}
            | {"2300": {}},
        }
    ),
    "terminals": "\n".join(["start: T0", *(f"T{i}: T{i + 1}" for i in range(9000)), 'T9000: "a"']),
}


@pytest.mark.parametrize("name", LONG)
def test_rules_that_call_each_other_thousands_deep_end_no_process(name):
    # In a process of its own: it is the process that would end, by a signal.
    assert len(LONG[name]) <= grammar.MAX_LENGTH
    program = (
        "import asyncio, json, sys; from server.text import grammar\n"
        "try: asyncio.run(grammar.check(json.load(sys.stdin)))\n"
        "except grammar.GrammarError as e: print(e)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        input=json.dumps(LONG[name]),
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr


def test_only_the_thread_that_compiles_has_a_large_stack():
    grammar.compiler()
    assert threading.stack_size() != grammar.STACK_BYTES
    assert grammar.compiler() is grammar.compiler()
