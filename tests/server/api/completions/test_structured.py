"""Answers that are held to a form: from the fields of a request to an answer of a live server that keeps to it."""

import itertools
import json
import re

import jsonschema
import openai
import pytest
from checkpoints import byte_tokenizer

from server.api.completions.chat_schemas import ChatRequest
from server.text import grammar

HELLO = [{"role": "user", "content": "Hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "kind": {"enum": ["a", "bc"]}},
    "required": ["name", "kind"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA, "strict": True}}
EVERY_WAY = {
    "json_schema": ({"response_format": FORMAT}, grammar.json_schema(SCHEMA)),
    "json_object": ({"response_format": {"type": "json_object"}}, grammar.json_object()),
    "json": ({"structured_outputs": {"json": SCHEMA}}, grammar.json_schema(SCHEMA)),
    "json as text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, grammar.json_schema(SCHEMA)),
    "compact": (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        grammar.json_schema(SCHEMA, compact=True),
    ),
    "any object": ({"structured_outputs": {"json_object": True}}, grammar.json_object()),
    "regex": ({"structured_outputs": {"regex": "a/b+"}}, grammar.regex("a/b+")),
    "choice": ({"structured_outputs": {"choice": ["a", "b"]}}, grammar.choice(["a", "b"])),
    "grammar": ({"structured_outputs": {"grammar": 'start: "a"'}}, 'start: "a"'),
    "guided_json": ({"guided_json": SCHEMA}, grammar.json_schema(SCHEMA)),
    "guided_regex": ({"guided_regex": "a"}, grammar.regex("a")),
    "guided_choice": ({"guided_choice": ["a"]}, grammar.choice(["a"])),
    "guided_grammar": ({"guided_grammar": 'start: "a"'}, 'start: "a"'),
    "text": ({"response_format": {"type": "text"}}, ""),
    "nothing": ({"response_format": None, "structured_outputs": None, "guided_json": None}, ""),
}
ENDPOINTS = {
    "/v1/completions": {"model": "dense", "prompt": "Hi", "max_tokens": 4},
    "/v1/chat/completions": {"model": "dense", "messages": HELLO, "max_tokens": 4},
}
ENDS = {"ignore_eos": True, "stop_token_ids": [0]}
"""The models of `server` end a text by the letter e, too, without which many an answer can't be spelled."""


def refused(response, param, *mentions):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    for mention in mentions:
        assert mention in error["message"]


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("way", EVERY_WAY)
def test_what_is_asked_for_is_the_engines_grammar(api, script, path, way):
    fields, expected = EVERY_WAY[way]
    response = api.post(path, json={**ENDPOINTS[path], **fields, "n": 2})
    assert response.status_code == 200, response.text
    assert [message.grammar for message in script.seen] == [expected] * 2


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    ("fields", "param", "mention"),
    [
        ({"guided_json": {"not": {}}}, "guided_json", "not"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_json": {"$ref": "http://127.0.0.1/x"}}, "guided_json", "127.0.0.1"),
        ({"guided_json": {"$ref": "file:///etc/passwd"}}, "guided_json", "passwd"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": "[" * 100_000}, "guided_json", "no JSON"),
        ({"guided_json": "3"}, "guided_json", "object or boolean"),
        ({"guided_json": False}, "guided_json", "false"),
        ({"guided_json": 3}, "guided_json", ""),
        ({"guided_json": {"enum": ["x" * 140_000]}}, "guided_json", "131072"),
        ({"guided_regex": "(a"}, "guided_regex", "unclosed group"),
        ({"guided_regex": "(?=a)"}, "guided_regex", "look-around"),
        ({"guided_regex": "a" * 140_000}, "guided_regex", "131072"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "x"),
        ({"guided_grammar": 'root ::= "a"'}, "guided_grammar", "="),
        ({"guided_choice": []}, "guided_choice", ""),
        ({"guided_choice": ["\ud800"]}, "guided_choice", ""),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "structural_tag"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "schema",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"structural_tag": {"x": 1}}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "choice"),
        (
            {"guided_regex": "a", "response_format": {"type": "json_object"}},
            "guided_regex",
            "response_format",
        ),
        ({"guided_regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids", "form"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "stop_token_ids"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_name(api, path, fields, param, mention):
    content = json.dumps({**ENDPOINTS[path], **fields})
    for stream in (False, True):
        content = json.dumps({**ENDPOINTS[path], **fields, "stream": stream})
        refused(api.post(path, content=content, headers={"content-type": "application/json"}), param, mention)


def test_without_the_end_of_text_another_token_may_end_it(api, script):
    fields = {"guided_regex": "a", "ignore_eos": True, "stop_token_ids": [5]}
    assert api.post("/v1/completions", json={**ENDPOINTS["/v1/completions"], **fields}).status_code == 200


def test_a_grammar_that_the_engine_refuses_is_400(api, server, script):
    # A token that the model's tokenizer lacks: only the engine knows.
    for stream in (False, True):
        response = server.http.post(
            "/v1/completions",
            json={**ENDPOINTS["/v1/completions"], "guided_grammar": "start: <|nobody|>", "stream": stream},
        )
        if stream:
            assert response.status_code == 200 and '"code":400' in response.text
        else:
            refused(response, None, "grammar", "nobody")
    assert api.get("/health").status_code == 200


def test_a_comparison_is_held_to_nothing(api):
    for field in ("guided_json", "response_format", "structured_outputs"):
        refused(
            api.post("/v1/compare", json={"prompt": "Hi", field: {"type": "json_object"}}),
            field,
            "not supported",
        )


def test_the_published_schema_names_what_there_is(api):
    schemas = api.get("/openapi.json").json()["components"]["schemas"]
    properties = schemas["ChatRequest"]["properties"]
    assert properties.keys() >= {"response_format", "structured_outputs", "guided_json"}
    assert ChatRequest.model_validate({"model": "x", "messages": HELLO, "response_format": FORMAT})
    assert {"json", "regex", "choice", "grammar"} <= schemas["StructuredOutputs"]["properties"].keys()


def ask(server, path="/v1/completions", **fields):
    body = {**ENDPOINTS[path], "max_tokens": 200, "seed": 3, **ENDS, **fields}
    response = server.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json() if not fields.get("stream") else events(response.text)


def events(text):
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def valid(text):
    value = json.loads(text)
    jsonschema.validate(value, SCHEMA)
    return value


@pytest.mark.parametrize("variant", ["dense", "reduced"])
def test_answers_keep_to_the_schema(server, variant):
    body = ask(server, model=variant, response_format=FORMAT, n=4)
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop"] * 4
    assert len({choice["text"] for choice in body["choices"]}) > 1
    for choice in body["choices"]:
        valid(choice["text"])
    chat = ask(server, "/v1/chat/completions", model=variant, response_format=FORMAT)
    valid(chat["choices"][0]["message"]["content"])


def test_a_stream_is_the_whole_answer_in_pieces(server):
    whole = ask(server, response_format=FORMAT, n=2, logprobs=2)
    streamed = ask(server, response_format=FORMAT, n=2, logprobs=2, stream=True)
    for choice in whole["choices"]:
        pieces = [c for event in streamed for c in event["choices"] if c["index"] == choice["index"]]
        text = "".join(c["text"] for c in pieces)
        assert text == choice["text"]
        valid(text)
        listed = itertools.chain.from_iterable(c["logprobs"]["tokens"] for c in pieces if c["logprobs"])
        assert list(listed) == choice["logprobs"]["tokens"]


def test_stop_strings_and_lengths_end_it_earlier(server):
    stopped = ask(server, guided_choice=["one END two"], stop="END")["choices"][0]
    assert (stopped["text"], stopped["finish_reason"]) == ("one ", "stop")
    short = ask(server, guided_choice=["one END two"], max_tokens=5)["choices"][0]
    assert (short["text"], short["finish_reason"]) == ("one E", "length")


def test_several_prompts(server):
    body = ask(server, prompt=["Hi", "Hello"], guided_regex="[0-9]{4}")
    assert all(re.fullmatch("[0-9]{4}", choice["text"]) for choice in body["choices"])


def test_the_openai_client_parses_what_it_asked_for(server):
    from pydantic import BaseModel

    class Answer(BaseModel):
        kind: str
        sure: bool

    client = openai.OpenAI(base_url=f"{server.http.base_url}/v1", api_key="x", max_retries=0)
    completion = client.chat.completions.parse(
        model="dense",
        messages=HELLO,
        response_format=Answer,
        seed=1,
        max_tokens=400,
        temperature=0.3,
        extra_body={"logit_bias": {str(byte_tokenizer().token_to_id('"')): 30.0}, **ENDS},  # short texts
    )
    assert isinstance(completion.choices[0].message.parsed, Answer)
