"""Arguments that are written as plain text, as the JSON that a tool's schema asks for."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.text.answers.literals import keywords_as_json, literal_as_json
from server.text.answers.schemas import as_json, properties_of, types_of, values_of

LEAVES = st.none() | st.booleans() | st.integers(-999, 999) | st.text("ab\"'\\\n é", max_size=6)
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text("ab'", max_size=3), v, max_size=3)
)


def value(text, schema, root=None):
    return json.loads(as_json(text, types_of(schema, root or {})))


@pytest.mark.parametrize(
    ("text", "schema", "expected"),
    [
        ("3", {"type": "integer"}, 3),
        (" 3 ", {"type": "integer"}, 3),
        ("3.0", {"type": "integer"}, 3),
        ("3.5", {"type": "integer"}, "3.5"),
        ("three", {"type": "integer"}, "three"),
        ("007", {"type": "integer"}, "007"),
        ("3", {"type": "string"}, "3"),
        ("null", {"type": "string"}, "null"),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("1e3", {"type": "number"}, 1000.0),
        ("NaN", {"type": "number"}, "NaN"),
        ("True", {"type": "boolean"}, True),
        ("false", {"type": "boolean"}, False),
        ("yes", {"type": "boolean"}, "yes"),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
        ("{'a': [True, None]}", {"type": "object"}, {"a": [True, None]}),
        ("[1, 2,]", {"type": "array"}, [1, 2]),
        ("(1, 2)", {"type": "array"}, "(1, 2)"),
        ("[1]", {"type": "object"}, "[1]"),
        ("[1]", {"type": "string"}, "[1]"),
        ("[1]", {}, [1]),
        ("1", {}, "1"),
        ("1.10", None, "1.10"),
        ("C", {"enum": ["C", "F"]}, "C"),
        ("2", {"enum": [1, 2]}, 2),
        ("2", {"const": 2}, 2),
        ("5", {"$ref": "#/$defs/n"}, 5),
        ("5", {"allOf": [{"description": "x"}, {"type": "integer"}]}, 5),
        ("5", {"oneOf": [{"type": "integer"}, {"minimum": 3}]}, "5"),
        ("5", {"$ref": "#/$defs/loop"}, "5"),
        ("5", {"$ref": "elsewhere.json"}, "5"),
        ("5", {"type": 7}, "5"),
        ("[" * 50_000, {"type": "array"}, "[" * 50_000),
        ("9" * 5000, {"type": "string"}, "9" * 5000),
    ],
    ids=lambda x: repr(x)[:30],
)
def test_values(text, schema, expected):
    root = {"$defs": {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
    found = value(text, schema, root)
    assert found == expected and type(found) is type(expected)


WIDE = {
    "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 100}, "b": {"allOf": [{"$ref": "#/$defs/b"}] * 100}}
}


@pytest.mark.parametrize("name", ["a", "b"])
def test_alternatives_that_multiply_come_to_an_end(name):
    assert types_of({"$ref": f"#/$defs/{name}"}, WIDE) == frozenset()
    assert values_of({"$ref": f"#/$defs/{name}"}, WIDE) is None


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string", "enum": ["a", "b"]}, ["a", "b"]),
        ({"const": 3}, [3]),
        ({"$ref": "#/$defs/colour"}, ["red", "blue"]),
        ({"allOf": [{"$ref": "#/$defs/colour"}], "default": "red"}, ["red", "blue"]),
        ({"anyOf": [{"$ref": "#/$defs/colour"}, {"type": "null"}]}, ["red", "blue", None]),
        ({"anyOf": [{"const": "a"}, {"type": "string"}]}, None),
        ({"type": "string"}, None),
        ({}, None),
        (True, None),
    ],
)
def test_listed_values(schema, expected):
    assert values_of(schema, {"$defs": {"colour": {"enum": ["red", "blue"], "type": "string"}}}) == expected


def test_arguments_of_a_schema_that_refers_to_another():
    model = {"type": "object", "properties": {"n": {"type": "integer"}}}
    assert properties_of({"$ref": "#/$defs/M", "$defs": {"M": model}}) == model["properties"]
    for none in ({}, {"$ref": "#"}, {"$ref": "#/$defs/M"}, {"properties": [1]}):
        assert properties_of(none) == {}


@given(VALUES)
def test_what_python_or_json_writes(given_value):
    assert json.loads(literal_as_json(repr(given_value))) == given_value
    assert json.loads(literal_as_json(json.dumps(given_value))) == given_value
    keywords = f"a={given_value!r}, b = {json.dumps(given_value)}"
    assert json.loads(keywords_as_json(keywords)) == {"a": given_value, "b": given_value}


NO_LITERALS = [
    "f()",
    "a",
    "1 2",
    "'a' 'b'",
    "a=1",
    "[1",
    "]",
    "'a",
    "lambda: 1",
    "1 if 2 else 3",
    "{1, 2}",
    "1+2",
    "",
]


@pytest.mark.parametrize("text", NO_LITERALS)
def test_what_is_no_literal(text):
    with pytest.raises(ValueError, match="."):
        literal_as_json(text)


def test_keywords():
    assert json.loads(keywords_as_json("")) == {}
    assert json.loads(keywords_as_json(" a = (1, 'x'), ")) == {"a": [1, "x"]}
    for text in ("1", "a=1 b=2", "a=b", "a=1, 2", "a==1", "[a=1]"):
        with pytest.raises(ValueError, match="."):
            keywords_as_json(text)
