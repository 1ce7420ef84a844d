"""Bodies of requests: what is skipped, what is counted before it is looked at, and that nothing else changes."""

import asyncio
import json
from typing import Annotated, Any

import pytest
from fastapi import Request
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from server.api.completions.chat_schemas import ChatRequest
from server.api.completions.schemas import MAX_BIASES, CompletionRequest
from server.api.http import bodies
from server.api.http.bodies import MAX_ITEMS, MAX_VALUES, parse
from server.api.http.errors import MAX_ECHO, APIError, from_validation
from server.api.http.fields import CheckedIds
from server.api.tokens.schemas import DetokenizeRequest


class Part(BaseModel):
    text: Any = None


class Open(BaseModel):
    """Keeps what it doesn't know."""

    model_config = ConfigDict(extra="allow")
    parts: list[Part] | str | None = None


class Anything(BaseModel):
    one: Any = None
    part: Part | None = None
    open: Annotated[list[Open] | None, "of a list"] = None


def refused(text, model=CompletionRequest):
    with pytest.raises(APIError) as error:
        parse(text if isinstance(text, bytes) else text.encode(), model)
    assert error.value.status == 400
    assert len(error.value.message) < 4000
    return error.value


def completion(**fields):
    """A body, from the text of each of its fields."""
    given = {"model": '"dense"', "prompt": '"x"', **fields}
    return "{" + ",".join(f'"{name}":{text}' for name, text in given.items()) + "}"


@pytest.fixture
def decoded(monkeypatch):
    """Bytes that each call has made values of, those that were only taken apart left out."""
    sizes = []
    real = bodies.msgspec.json.decode

    def counting(text, **options):
        if "type" not in options:
            sizes.append(len(text))
        return real(text, **options)

    monkeypatch.setattr(bodies.msgspec.json, "decode", counting)
    return sizes


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(), inner, max_size=5),
    max_leaves=40,
)


@given(values, st.booleans())
def test_a_body_has_the_values_that_python_reads_in_it(value, spaced):
    text = json.dumps({"one": value, "two": value}, indent=2 if spaced else None)
    assert parse(text.encode(), Anything).one == value
    text = json.dumps({"open": [{"parts": [{"text": value, "more": 5}], "other": value}, {}]})
    first, second = parse(text.encode(), Anything).open
    assert first.parts[0].text == value and first.model_extra == {"other": value}
    assert second.parts is None and not second.model_extra


@pytest.mark.parametrize("count", [0, 1, 5, 5000, 10**5])
@pytest.mark.parametrize("separators", [(",", ":"), (" ,\n", ": ")], ids=["dense", "spaced"])
def test_token_ids_are_all_there(count, separators):
    ids = [(7919 * i) % 2**31 for i in range(count)]
    tokens = json.dumps({"tokens": ids}, separators=separators).encode()
    assert parse(tokens, DetokenizeRequest).tokens == ids
    lists = json.dumps({"model": "m", "prompt": [[1], ids, [2]]}, separators=separators).encode()
    assert parse(lists, CompletionRequest).prompts == [[1], ids, [2]]


def test_many_token_ids_are_checked_when_they_are_read():
    tokens = parse(b'{"tokens": [' + b"1," * 2000 + b"1]}", DetokenizeRequest).tokens
    assert type(tokens) is CheckedIds
    assert "below 2147483648" in refused(completion(prompt="[" + "1," * 10**5 + "2147483648]")).message
    error = refused(completion(stop_token_ids="[" + "1," * 2000 + "1]"))
    assert error.param == "stop_token_ids" and "at most 64" in error.message


def test_what_no_field_asks_for_is_never_made(decoded):
    lists = "[" + "[]," * 900_000 + "[]]"
    body = completion(unknown=lists, temperature="0.5", **{'a\\"b': lists})
    assert parse(body.encode(), CompletionRequest).temperature == 0.5
    assert sum(decoded) < 100


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("logit_bias", "{" + ",".join(f'"x{i}":"y"' for i in range(200_000)) + "}"),
        ("logit_bias", "{" + ",".join(f'"x{i}":"y"' for i in range(MAX_BIASES + 1)) + "}"),
        ("temperature", "[" + "[]," * 900_000 + "[]]"),
        ("tools", "[" + "{}," * 900_000 + "{}]"),
        ("stop", "[" + '"a",' * 900_000 + '"a"]'),
        ("stop_token_ids", "[" + "-1," * 900_000 + "1]"),
        ("prompt", "[" + "1.5," * 900_000 + "1]"),
        ("prompt", "[" + "[1]," * 900_000 + "[1]]"),
        ("prompt", "[" * 900_000 + "]" * 900_000),
    ],
    ids=lambda x: x[:16],
)
def test_too_many_values_are_refused_before_they_are_made(field, text, decoded):
    error = refused(completion(**{field: text}))
    assert error.param == (None if text.startswith("[[[") else field)
    assert error.message.count(";") == 0
    assert sum(decoded) < 50_000


@pytest.mark.parametrize(
    "messages",
    [
        '{"role": "user", "content": "x", "extra": [' + "[]," * 900_000 + "[]]}",
        ",".join(['{"role": "user", "content": "x", "extra": [' + "[]," * 900 + "[]]}"] * 500),
        '{"role": "user", ' + ",".join(f'"k{i}": 1' for i in range(200_000)) + "}",
        '{"role": "user", "content": [' + '{"type":"text","text":""},' * 50_000 + "{}]}",
        ",".join(['{"role": "user", "content": [' + '{"type":"text","text":""},' * 900 + "{}]}"] * 100),
        ",".join(['{"role": "user"}'] * 100_000),
        ",".join(["{}"] * 900_000),
    ],
    ids=["a field", "fields", "keys", "parts", "all parts", "messages", "empty ones"],
)
def test_messages_hold_so_much_and_no_more(messages, decoded):
    error = refused('{"model": "dense", "messages": [' + messages + "]}", ChatRequest)
    assert error.param == "messages" and (str(MAX_VALUES) in error.message or str(MAX_ITEMS) in error.message)
    assert sum(decoded) < 2 * 2**20


def test_a_long_conversation_is_none_too_long():
    text = "one, two [three] {four}: " * 30
    messages = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": [{"type": "text", "text": text}]},
    ]
    body = {"model": "dense", "messages": messages * 1000}
    read = parse(json.dumps(body).encode(), ChatRequest).messages
    assert len(read) == 2000 and read[0].content == read[1].content[0].text == text


def test_errors_are_counted_and_their_inputs_are_cut():
    long = {"a": ["y" * 10**6, list(range(10**4))], "b": 1}
    body = completion(**{f: json.dumps(long) for f in ("stop", "seed", "top_k", "user")})
    parts = refused(body).message.split("; ")
    assert len(parts) >= 4
    assert all(part.endswith("...") and len(part) < MAX_ECHO + 100 for part in parts)
    error = refused(completion(logit_bias="{" + ",".join(f'"x{i}":"y"' for i in range(1000)) + "}"))
    assert error.message.count("logit_bias") == 10 and error.message.endswith("and 1990 more")


@given(values)
def test_an_echo_is_the_beginning_of_what_python_writes(value):
    error = {"loc": ("field",), "msg": "is bad", "type": "t", "input": value}
    shown = from_validation([error]).message.removeprefix("field: is bad, got ")
    whole = repr(value)
    assert shown == (whole if len(whole) <= MAX_ECHO else whole[:MAX_ECHO] + "...")


def test_a_client_that_leaves_before_its_body_is_read_is_no_fault_of_the_servers():
    """It was a traceback in the log and a 500 in the metrics."""

    async def receive():
        return {"type": "http.disconnect"}

    scope = {"type": "http", "headers": [(b"content-type", b"application/json")]}
    with pytest.raises(APIError) as error:
        asyncio.run(bodies._read(Request(scope, receive), CompletionRequest))
    assert error.value.status == 499
