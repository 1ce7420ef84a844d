"""How much one request can ask for, and that long answers are made in pieces."""

import asyncio
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.http import encoding
from server.api.http.aside import aside
from server.api.http.encoding import json_list, json_response, json_text
from server.settings import Settings

MOST = Settings().max_answer_entries
HELLO = [{"role": "user", "content": "Hello"}]


def post(server, path="/v1/completions", **fields):
    return server.http.post(path, json={"model": "dense", **fields})


def refused(response, param, *mentions):
    assert response.status_code == 400, response.text[:500]
    error = response.json()["error"]
    assert error["param"] == param and error["message"].startswith(f"{param}: ")
    for mention in ("max_answer_entries", str(MOST), *mentions):
        assert mention in error["message"]


def test_an_answer_has_so_many_entries_and_no_more(server):
    fields = {"echo": True, "logprobs": 20, "max_tokens": 0}
    refused(post(server, prompt=[[5] * 2000] * 160, **fields), "logprobs", str(160 * 2000 * 21))
    refused(post(server, prompt=[[5] * 2000] * 160, **fields, stream=True), "logprobs")
    refused(post(server, prompt="x", n=128, max_tokens=60_000, logprobs=0), "logprobs", str(128 * 60_000))
    refused(post(server, prompt=[5] * 20_000, n=128, echo=True), "n", str(128 * 20_000))
    limits = {"n": 2, "max_tokens": 60_000, "logprobs": True, "top_logprobs": 20}
    refused(post(server, "/v1/chat/completions", messages=HELLO, **limits), "logprobs", str(120_000 * 21))
    assert server.sample("lowkey_requests_running", variant="dense", engine="0") == 0


def test_a_chat_that_names_no_limit_has_one_that_fits(server):
    # The context has room for 2.7 million entries; a text ends long before.
    fields = {"n": 2, "logprobs": True, "top_logprobs": 20, "seed": 1}
    response = post(server, "/v1/chat/completions", messages=HELLO, **fields)
    assert response.status_code == 200, response.text[:500]


def test_long_echoes_come_in_several_events_that_are_the_whole(server):
    ids = [(7 * i) % 250 + 1 for i in range(1201)]
    fields = {
        "prompt": [ids, [5]],
        "n": 2,
        "echo": True,
        "logprobs": 3,
        "max_tokens": 2,
        "seed": 1,
        "temperature": 0,
    }
    whole = server.complete(**fields)["choices"]
    events = [json.loads(event) for event in server.events(**fields)[:-1]]
    listed = [choice for event in events for choice in event["choices"]]
    assert max(len(choice["logprobs"]["tokens"]) for choice in listed) == 100
    for choice in whole:
        parts = [part for part in listed if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        streamed = {
            name: [value for part in parts for value in part["logprobs"][name]] for name in choice["logprobs"]
        }
        for name in ("tokens", "text_offset"):
            assert streamed[name] == choice["logprobs"][name]
        # Products in float32 differ by about 1e-6 with what else is in the batch.
        for ours, expected in (
            (streamed["token_logprobs"][1:], choice["logprobs"]["token_logprobs"][1:]),
            *zip(streamed["top_logprobs"][1:], choice["logprobs"]["top_logprobs"][1:], strict=True),
        ):
            assert ours == pytest.approx(expected, abs=1e-4)
        assert len(parts) >= (13 if choice["index"] < 2 else 2)


def test_tokens_of_long_texts(server):
    text = "é{}\n" * 20_000
    answer = post(server, "/tokenize", prompt=text, return_token_strs=True).json()
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"]) == len(text.encode())
    assert post(server, "/detokenize", tokens=answer["tokens"]).json() == {"prompt": text}
    for path, fields, param in (
        ("/tokenize", {"prompt": "é" * (2**18 + 1)}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 2**19}]}, "messages"),
        ("/detokenize", {"tokens": [1] * (2**19 + 1)}, "tokens"),
    ):
        response = post(server, path, **fields)
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == param, error
        assert str(2**19) in error["message"]


@pytest.fixture
def encoded(monkeypatch):
    """Length of each text that was encoded in one call."""

    class Encoder:
        def encode(self, value):
            text = real.encode(value)
            sizes.append(len(text))
            return text

    sizes, real = [], encoding.encoder
    monkeypatch.setattr(encoding, "encoder", Encoder())
    return sizes


def test_a_long_list_is_encoded_a_little_at_a_time(encoded):
    text = json_list(range(100_000), lambda i: {"value": i})
    assert json.loads(bytes(text)) == [{"value": i} for i in range(100_000)]
    assert len(encoded) == 200 and max(encoded) < 10_000


def test_a_long_text_is_encoded_a_little_at_a_time(encoded):
    text = 'é"\\\n\U0001f600' * 400_000
    assert json.loads(bytes(json_text(text))) == text
    assert max(encoded) < 2**20


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(TEXTS, max_size=5), TEXTS)
def test_answers_in_pieces_are_json(texts, text):
    body = json_response({"list": json_list(texts, lambda x: x), "text": json_text(text), "none": None}).body
    assert json.loads(body) == {"list": texts, "text": text, "none": None}


def test_what_takes_long_shares_one_thread():
    async def work():
        return await asyncio.gather(*(aside(threading.get_ident) for _ in range(20)))

    assert len(set(asyncio.run(work())) - {threading.get_ident()}) == 1
