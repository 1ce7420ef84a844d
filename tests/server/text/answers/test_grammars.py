"""Grammars of calls that are demanded: what they allow is read as calls that fit the tools' schemas."""

import json
import random

import jsonschema
import pytest
from answers import TOOLS, message, read, reader, written
from checkpoints import byte_tokenizer
from llguidance import LLMatcher, LLTokenizer

from server.text.answers.formats import CALL_FORMATS
from server.text.answers.grammars import behind_thoughts, demanded, kept
from server.text.answers.lark import any_of, bounded
from server.text.answers.reader import Thinking
from server.text.grammar import GrammarError

FORMATS = ["qwen3_coder", "hermes", "olmo3"]
PLAIN = byte_tokenizer()
TAGS = ["<tool_call>", "</tool_call>", "<function_calls>", "</function_calls>", "<think>", "</think>"]
TAGGED = byte_tokenizer(TAGS)
CALLS = [("get_weather", {"city": 'Bern "<b>"\n', "days": 3, "units": "C", "tags": ["a", "b"]}), ("now", {})]

MANY = {
    "f": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a b", 5, None, True]},
            "when": {"$ref": "#/$defs/time"},
            "maybe": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
            "on": {"type": "boolean"},
            "list": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
        },
        "required": ["when", "list"],
        "$defs": {
            "time": {
                "type": "object",
                "properties": {"h": {"type": "integer", "minimum": 0, "maximum": 23}},
                "required": ["h"],
                "additionalProperties": False,
            }
        },
    },
    "g": {"type": "object", "properties": {}, "additionalProperties": False},
}


def matcher(text, tokenizer):
    found = LLMatcher(LLTokenizer(tokenizer.to_str(), eos_token=0), text)
    assert not found.is_error(), found.get_error()
    return found


def allows(text, tokenizer, said):
    found = matcher(text, tokenizer)
    ids = tokenizer.encode(said, add_special_tokens=False).ids
    return found.try_consume_tokens(ids) == len(ids) and found.is_accepting()


@pytest.mark.parametrize("tokenizer", [PLAIN, TAGGED], ids=["plain", "tagged"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_templates_write_is_allowed(name, tokenizer):
    rules = demanded(CALL_FORMATS[name], TOOLS, tokenizer, parallel=True)
    for made in (CALLS, CALLS[:1], CALLS[1:]):
        said = written(name, made)
        assert allows(rules, tokenizer, said) and allows(rules, tokenizer, f"\n\n{said}")
        behind = behind_thoughts(rules, Thinking.OPEN, tokenizer)
        assert allows(behind, tokenizer, f"hm\n</think>\n\n{said}")
    one = demanded(CALL_FORMATS[name], TOOLS, tokenizer, parallel=False)
    assert allows(one, tokenizer, written(name, CALLS[:1])) and not allows(
        one, tokenizer, written(name, CALLS)
    )
    for other in ("", "Hello", written(name, [("other", {})]), written(name, [("get_weather", {})])):
        assert not allows(rules, tokenizer, other)


@pytest.mark.parametrize("name", FORMATS)
def test_whatever_is_allowed_is_a_call_that_fits(name):
    rules = demanded(CALL_FORMATS[name], MANY, PLAIN, parallel=True)
    drawn = random.Random(1)
    for _ in range(40):
        following, ids = matcher(rules, PLAIN), []
        while not following.is_stopped() and len(ids) < 400:
            mask = following.compute_bitmask()
            allowed = [i for i in range(257) if mask[i // 8] >> (i % 8) & 1]
            token = 0 if 0 in allowed else drawn.choice(allowed)
            assert following.consume_token(token)
            if token == 0:
                break
            ids.append(token)
        said = PLAIN.decode(ids)
        answer = reader(name, tools=MANY)
        read_back = message(read(answer, [said]))
        assert read_back["content"] == "" and answer.called, said
        for call in read_back["calls"]:
            jsonschema.validate(json.loads(call["arguments"]), MANY[call["name"]])


@pytest.mark.parametrize("name", FORMATS)
def test_strict_calls_among_text(name):
    calls = CALL_FORMATS[name]
    rules, one = (kept(calls, TOOLS, TAGGED, parallel=parallel) for parallel in (True, False))
    said = written(name, CALLS)
    for text in ("", "Hello <b>, a < b", f"Look:\n\n{said}", f"{said}\nand\n{said}\n."):
        assert allows(rules, TAGGED, text), text
    assert allows(one, TAGGED, f"Look: {written(name, CALLS[:1])}") and not allows(one, TAGGED, said)
    for text in (
        f"{calls.opening}nonsense",
        written(name, [("other", {})]),
        written(name, [("get_weather", {})]),
    ):
        assert not allows(rules, TAGGED, text), text
    maybe = behind_thoughts(rules, Thinking.MAYBE, TAGGED)
    assert allows(maybe, TAGGED, f"<think>\nhm\n</think>\n\nLook: {said}") and allows(
        maybe, TAGGED, f"Look: {said}"
    )
    assert kept(calls, TOOLS, PLAIN, parallel=True) is None


COLOUR = {"type": "string", "enum": ["red", "blue"]}
REFERRING = {
    "$ref": "#/$defs/Car",
    "$defs": {
        "Colour": COLOUR,
        "Car": {
            "type": "object",
            "properties": {
                "colour": {"$ref": "#/$defs/Colour"},
                "roof": {"anyOf": [{"$ref": "#/$defs/Colour"}, {"type": "null"}], "default": None},
                "wheels": {"const": "four"},
            },
            "required": ["colour", "wheels", "place"],
        },
    },
}


@pytest.mark.parametrize("name", FORMATS)
def test_what_schemas_say_by_references_is_kept(name):
    tools = {"paint": REFERRING}
    rules = demanded(CALL_FORMATS[name], tools, PLAIN, parallel=False)
    good = {"colour": "red", "roof": "blue", "wheels": "four", "place": "here"}
    assert allows(rules, PLAIN, written(name, [("paint", good)]))
    for bad in ({"colour": "green"}, {"roof": "green"}, {"wheels": "five"}):
        assert not allows(rules, PLAIN, written(name, [("paint", {**good, **bad})])), bad
    for left_out in ("colour", "wheels", "place"):
        some = {key: value for key, value in good.items() if key != left_out}
        assert not allows(rules, PLAIN, written(name, [("paint", some)])), left_out


@pytest.mark.parametrize("after", ["\n", "</function>\n</tool_call>", "\n<parameter=x>\n3\n</parameter>\n"])
def test_a_text_ends_where_its_reader_ends_it(after):
    tools = {"f": {"type": "object", "properties": {"t": {"type": "string"}}, "required": ["t"]}}
    rules = demanded(CALL_FORMATS["qwen3_coder"], tools, PLAIN, parallel=False)
    said = f"<tool_call>\n<function=f>\n<parameter=t>\na</parameter>{after}"
    rest = "b\n</parameter>\n</function>\n</tool_call>"
    assert not allows(rules, PLAIN, said + rest)
    assert allows(rules, PLAIN, f"<tool_call>\n<function=f>\n<parameter=t>\na <b>\n{rest}")


@pytest.mark.parametrize(
    ("name", "schema", "reason"),
    [
        ("qwen3_coder", {"properties": {"a>b": {}}}, r"f: an argument can't be called \"a>b\""),
        ("qwen3_coder", {"properties": {"": {}}}, "can't be called"),
        ("qwen3_coder", {"properties": {"a" * 257: {}}}, "can't be called"),
        ("olmo3", {"properties": {"$select": {}}}, r'f: an argument can\'t be called "\$select"'),
        ("qwen3_coder", {"anyOf": [{"required": ["a"]}]}, "f: anyOf"),
        ("olmo3", {"$ref": "#"}, r"f: \$ref"),
        ("qwen3_coder", {"$ref": "#/$defs/A", "$defs": {"A": {"properties": [1]}}}, "f: properties must be"),
        ("qwen3_coder", {"$ref": "#/$defs/A", "$defs": {"A": {"required": 1}}}, "f: required must be"),
    ],
)
def test_what_no_call_can_be_held_to(name, schema, reason):
    with pytest.raises(GrammarError, match=reason):
        demanded(CALL_FORMATS[name], {"f": schema}, PLAIN, parallel=True)


@pytest.mark.parametrize("name", ["qwen3_coder", "olmo3"])
def test_rules_are_not_made_without_end(name):
    properties = {f"p{number}": {"type": "integer"} for number in range(1000)}
    schema = {"properties": properties, "$defs": {"d": {"description": "x" * 50_000}}}
    made = []

    def quote(text):
        made.append(text)
        return json.dumps(text)

    with pytest.raises(GrammarError, match="more than 131072 characters"):
        list(bounded(CALL_FORMATS[name].rules({"f": schema}, quote, parallel=True)))
    assert 3 < len(made) < 30
    with pytest.raises(GrammarError, match="more than 131072 characters"):
        any_of(quote("x" * 1000) for _ in range(1000))
    assert len(made) < 200
