"""Fields that other servers know: honoured, or refused by name. None that changes something is ignored."""

import re
from pathlib import Path

import pytest
from checkpoints import byte_tokenizer
from scripted import CONTEXT, SCRIPTS
from tokenizers import processors

from server.api.ab.schemas import CompareRequest
from server.api.completions import refused

TOKENIZER = byte_tokenizer()
HELLO = [{"role": "user", "content": "Hello"}]
ENDPOINTS = {
    "/v1/completions": ({"model": "dense", "prompt": "Hi", "max_tokens": 4}, refused.COMPLETIONS),
    "/v1/chat/completions": ({"model": "dense", "messages": HELLO, "max_tokens": 4}, refused.CHAT),
    "/v1/compare": ({"prompt": "Hi", "max_tokens": 4}, CompareRequest.no_ops),
    "/tokenize": ({"model": "dense", "messages": HELLO}, refused.RENDERING),
}
GENERATING = [path for path in ENDPOINTS if path != "/tokenize"]
TOO_LONG = "abc" * CONTEXT


def post(api, path="/v1/completions", **fields):
    return api.post(path, json={**ENDPOINTS[path][0], **fields})


def ok(response):
    assert response.status_code == 200, response.text
    return response.json()


def error_of(response):
    assert response.status_code == 400, response.text
    return response.json()["error"]


@pytest.mark.parametrize(
    ("path", "field"), [(path, field) for path, (_, no_ops) in ENDPOINTS.items() for field in no_ops]
)
def test_a_field_that_is_not_supported_is_refused_unless_it_changes_nothing(api, path, field):
    for value in ("something", ["something"], {"a": 1}, 7):
        error = error_of(post(api, path, **{field: value}))
        assert error["param"] == field and error["message"] == f"{field} is not supported"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_changes_nothing_is_accepted(api, path):
    no_ops = ENDPOINTS[path][1]
    for at in range(max(map(len, no_ops.values()))):
        ok(post(api, path, **{field: values[min(at, len(values) - 1)] for field, values in no_ops.items()}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_beam_search", 0),
        ("tools", {}),
        ("length_penalty", True),
        ("return_token_ids", True),
        ("bad_words", [""]),
        ("response_format", {}),
        ("structured_outputs", {}),
        ("structured_outputs", {"structural_tag": {}}),
        ("stream_interval", 1.0),
        ("prompt_logprobs", 0),
        ("suffix", ""),
    ],
)
def test_what_is_like_a_value_that_changes_nothing_is_not_one(api, field, value):
    assert error_of(post(api, **{field: value}))["param"] == field


def test_several_fields_are_refused_together(api):
    error = error_of(post(api, ebnf={}, regex="a+"))
    assert error["message"] == "regex is not supported; ebnf is not supported"
    error = error_of(post(api, **dict.fromkeys(refused.COMPLETIONS, "x")))
    assert error["message"].count("; ") == 9, "ten at most"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_concerns_nobody_is_ignored(api, path):
    fields = {"store": True, "metadata": {"a": "b"}, "service_tier": "flex", "parallel_tool_calls": True}
    fields |= {"prediction": {"type": "content", "content": "x"}, "safety_identifier": "x", "request_id": "1"}
    ok(post(api, path, **fields, nobody={"knows": ["this"]}))


def test_the_documentation_has_the_same_table():
    text = Path(__file__).parents[4].joinpath("docs/api.md").read_text()
    section = text.split("## Fields that are refused")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `")]
    tables = {
        "everywhere": refused.CHOICES,
        "/v1/completions": refused.COMPLETIONS,
        "chat": refused.CHAT,
        "/tokenize": refused.RENDERING,
    }
    tables["/v1/compare"] = CompareRequest.no_ops
    for where, no_ops in tables.items():
        own = {"everywhere"} if where != "/tokenize" else set()
        documented = {
            field
            for fields, places in rows
            if (own | {where}) & {place.strip() for place in places.split(",")}
            for field in re.findall(r"`(\w+)`", fields)
        }
        assert documented == no_ops.keys(), where


def test_a_stop_text_can_stay(api, script):
    ids = TOKENIZER.encode("one END two").ids
    for keep, text in ((False, "one "), (None, "one "), (True, "one END")):
        fields = {"stop": ["END", "EN D"], "max_tokens": len(ids), "include_stop_str_in_output": keep}
        script.queue += [ids] * 4
        (choice,) = ok(post(api, **fields))["choices"]
        assert choice["text"] == text and choice["finish_reason"] == "stop"
        (choice,) = ok(post(api, "/v1/chat/completions", **fields))["choices"]
        assert choice["message"]["content"] == text
        streamed = post(api, **fields, stream=True)
        assert "".join(re.findall(r'"text":"([^"]*)"', streamed.text)) == text
        SCRIPTS["reduced"].queue.append(ids)
        compared = ok(post(api, "/v1/compare", **fields))
        assert [result["text"] for result in compared["results"]] == [text, text]
        script.queue.clear()


def test_a_stop_token_can_stay(api, script):
    letter = TOKENIZER.encode("x").ids[0]
    fields = {"stop_token_ids": [letter], "max_tokens": 4}
    for keep, text in ((False, "ab"), (True, "abx")):
        script.queue.append(TOKENIZER.encode("abxy").ids)
        assert ok(post(api, **fields, include_stop_str_in_output=keep))["choices"][0]["text"] == text
    for skip, text in ((True, "a"), (False, "a<|endoftext|>")):
        script.queue.append([*TOKENIZER.encode("a").ids, 0])
        fields = {"include_stop_str_in_output": True, "skip_special_tokens": skip}
        assert ok(post(api, **fields))["choices"][0]["text"] == text


@pytest.mark.parametrize("path", GENERATING)
def test_a_prompt_is_cut_to_its_end(api, script, path):
    field = "messages" if path == "/v1/chat/completions" else "prompt"

    def prompt(text):
        return [{"role": "user", "content": text}] if field == "messages" else text

    def sent(**fields):
        body = ok(post(api, path, **fields))
        usage = body["results"][0]["usage"] if path == "/v1/compare" else body["usage"]
        ids = next(message.token_ids for message in reversed(script.seen) if hasattr(message, "max_tokens"))
        assert usage["prompt_tokens"] == len(ids)
        return ids

    whole = sent(**{field: prompt("Hello there")})
    for last in (1, 5, len(whole), len(whole) + 1, 2**31):
        assert sent(**{field: prompt("Hello there")}, truncate_prompt_tokens=last) == whole[-last:]
    assert sent(**{field: prompt("Hello there")}, truncate_prompt_tokens=-1) == whole
    # What fits beside the completion of 4.
    longest = sent(**{field: prompt(TOO_LONG)}, truncate_prompt_tokens=-1)
    assert len(longest) == CONTEXT - 4
    if field == "prompt":
        assert longest == TOKENIZER.encode(TOO_LONG).ids[-len(longest) :]
        assert sent(prompt=whole, truncate_prompt_tokens=3) == whole[-3:]
    assert error_of(post(api, path, **{field: prompt(TOO_LONG)}))["param"] == field
    error = error_of(post(api, path, **{field: prompt(TOO_LONG)}, truncate_prompt_tokens=CONTEXT))
    assert f"the prompt has {CONTEXT}" in error["message"]


@pytest.mark.parametrize("value", [0, -2, 1.5, "1", True, 2**40])
def test_bad_lengths_of_a_prompt(api, value):
    assert error_of(post(api, truncate_prompt_tokens=value))["param"] == "truncate_prompt_tokens"


def test_what_is_echoed_is_what_was_run(api):
    ids = TOKENIZER.encode("Hello there").ids
    fields = {"echo": True, "max_tokens": 0, "logprobs": 0}
    for prompt in ("Hello there", ids):
        (choice,) = ok(post(api, prompt=prompt, **fields, truncate_prompt_tokens=5))["choices"]
        assert choice["text"] == "there" == "".join(choice["logprobs"]["tokens"])
        assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


def test_special_tokens_are_added_as_asked(api, script, monkeypatch):
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    for name in ("dense", "reduced"):
        monkeypatch.setattr(api.app.state.service.variants.get(name).text, "tokenizer", tokenizer)
    for path, default in (("/v1/completions", True), ("/v1/chat/completions", False), ("/v1/compare", True)):
        for given, added in ((None, default), (True, True), (False, False)):
            ok(post(api, path, add_special_tokens=given))
            assert (script.seen[-1].token_ids[0] == 0) == added, (path, given)


@pytest.mark.parametrize("path", GENERATING)
def test_allowed_tokens_reach_the_engine(api, script, path):
    ok(post(api, path, allowed_token_ids=[5, 7]))
    ok(post(api, path, allowed_token_ids=[0], ignore_eos=True, min_tokens=2))
    ok(post(api, path))
    sent = [m.sampling.allowed_token_ids for m in script.seen if hasattr(m, "sampling")]
    assert sent == [[5, 7], [0], []]
    for bad, mention in (([], "at least 1"), ([257], "257"), ([5] * 1025, "1024"), ([-1], "-1"), ("5", "")):
        error = error_of(post(api, path, allowed_token_ids=bad))
        assert error["param"] == "allowed_token_ids" and mention in error["message"]
    error = error_of(post(api, path, allowed_token_ids=[0, 5], stop_token_ids=[5], min_tokens=2))
    assert error["param"] == "allowed_token_ids" and "min_tokens" in error["message"]


def test_tokenize_refuses_what_only_messages_can_have(api):
    for fields in (
        {"continue_final_message": True, "add_generation_prompt": False},
        {"chat_template_kwargs": {"a": 1}},
    ):
        response = api.post("/tokenize", json={"prompt": "x", **fields})
        assert (
            error_of(response)["param"] == next(iter(fields))
            and "needs messages" in error_of(response)["message"]
        )
