"""POST /v1/completions as its clients use it: every field, both transports, exact framing."""

import asyncio
import itertools
import json

import openai
import pytest
from checkpoints import byte_tokenizer
from live_server import CONTEXT, E_ID

TOKENIZER = byte_tokenizer()

SEEDED = dict(seed=1, top_p=0.8)
"""Draws text of printable characters."""


@pytest.fixture(scope="module")
def text(server):
    """120 tokens of printable text at seed 1; each token is one character."""
    body = server.complete(max_tokens=120, **SEEDED)
    text = body["choices"][0]["text"]
    assert text.isascii() and len(text) == 120 and "e" in text[:100]
    return text


def test_events_are_framed_exactly(server, text):
    events = server.events(max_tokens=120, **SEEDED)
    assert events[-1] == "[DONE]"
    chunks = [json.loads(e) for e in events[:-1]]
    # One chunk for each token, or for all that came while the server or the reader was busy; then the reason.
    texts = [c["choices"][0]["text"] for c in chunks]
    assert "".join(texts) == text and all(texts[:-1]) and texts[-1] == ""
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(set(c) == {"id", "object", "created", "model", "choices"} for c in chunks[:-1])
    assert set(chunks[-1]) == {"id", "object", "created", "model", "choices", "lowkey"}
    assert chunks[-1]["lowkey"]["tokens_per_second"] > 0
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1


def test_headers_of_a_stream(server):
    with server.http.stream(
        "POST", "/v1/completions", json={"model": "dense", "prompt": "x", "max_tokens": 1, "stream": True}
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-request-id"]
        response.read()


def test_include_usage(server):
    chunks = [json.loads(e) for e in server.events(max_tokens=4, stream_options={"include_usage": True})[:-1]]
    assert all(c["usage"] is None for c in chunks[:-1])
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    assert usage.pop("prompt_tokens_details")["cached_tokens"] >= 0
    assert usage == {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
    assert [("lowkey" in c) for c in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_continuous_usage(server):
    chunks = [
        json.loads(e)
        for e in server.events(max_tokens=5, **SEEDED, stream_options={"continuous_usage_stats": True})[:-1]
    ]
    # Every token is one character, and tokens that waited for the loop share a chunk.
    texts = [c["choices"][0]["text"] for c in chunks]
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == list(itertools.accumulate(map(len, texts))) and counts[-1] == 5
    assert all(c["usage"]["prompt_tokens"] == 9 for c in chunks)


def test_both_usage_options(server):
    options = {"continuous_usage_stats": True, "include_usage": True}
    chunks = [json.loads(e) for e in server.events(max_tokens=3, **SEEDED, stream_options=options)[:-1]]
    counts = [c["usage"]["completion_tokens"] for c in chunks]
    assert counts == sorted(counts) and counts[-3:] == [3, 3, 3]
    assert chunks[-1]["choices"] == [] and chunks[-2]["choices"]


def test_same_seed_same_text(server, text):
    assert server.complete(max_tokens=120, **SEEDED)["choices"][0]["text"] == text
    assert server.complete(max_tokens=120, seed=2, top_p=0.8)["choices"][0]["text"] != text
    assert len({server.complete(max_tokens=20)["choices"][0]["text"] for _ in range(3)}) == 3
    for seed in (-1, -(2**63), 2**63 - 1):
        once, again = (server.complete(max_tokens=20, seed=seed)["choices"][0]["text"] for _ in range(2))
        assert once == again


def test_greedy_and_what_amounts_to_it(server):
    greedy = server.complete(max_tokens=30, temperature=0)["choices"][0]["text"]
    assert greedy == server.complete(max_tokens=30, temperature=0, seed=9)["choices"][0]["text"]
    for fields in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 5e-324}):
        assert server.complete(max_tokens=30, **fields)["choices"][0]["text"] == greedy
    off = {"top_k": -1, "top_p": 1, "min_p": 0, "temperature": 1}
    assert (
        server.complete(max_tokens=30, seed=1, **off)["choices"][0]["text"]
        == server.complete(max_tokens=30, seed=1)["choices"][0]["text"]
        != greedy
    )


def test_token_ids_are_the_text(server, text):
    ids = TOKENIZER.encode("Once upon").ids
    assert server.complete(prompt=ids, max_tokens=120, **SEEDED)["choices"][0]["text"] == text


def test_defaults_are_openais(server):
    body = server.complete(max_tokens=None, temperature=None, seed=None, stop=None, n=None, stream=None)
    assert body["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_string_cuts_the_text_and_the_count(server, text, length, stream):
    at = next(i for i in range(40, 100) if text.index(text[i : i + length]) == i)
    stop = text[at : at + length]
    fields = dict(max_tokens=120, **SEEDED, stop=["\u2603 never", stop])
    if stream:
        chunks = [json.loads(e) for e in server.events(**fields, stream_options={"include_usage": True})[:-1]]
        shown = "".join(c["choices"][0]["text"] for c in chunks[:-1])
        reason, usage = chunks[-2]["choices"][0]["finish_reason"], chunks[-1]["usage"]
    else:
        body = server.complete(**fields)
        (choice,) = body["choices"]
        shown, reason, usage = choice["text"], choice["finish_reason"], body["usage"]
    assert shown == text[:at]
    assert reason == "stop"
    assert usage["completion_tokens"] == at + length
    server.wait_idle()


def test_text_held_back_for_a_stop_that_never_comes_is_shown_at_the_end(server, text):
    assert (
        server.complete(max_tokens=20, **SEEDED, stop=text[15:20] + "\u2603")["choices"][0]["text"]
        == text[:20]
    )
    events = [json.loads(e) for e in server.events(max_tokens=20, **SEEDED, stop=text[15:20] + "\u2603")[:-1]]
    assert "".join(c["choices"][0]["text"] for c in events) == text[:20]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_stop_token_ids(server, text):
    ids = TOKENIZER.encode(text).ids
    stop = ids[50]
    at = ids.index(stop)
    body = server.complete(max_tokens=120, **SEEDED, stop_token_ids=[stop])
    assert body["choices"][0] == {"index": 0, "text": text[:at], "logprobs": None, "finish_reason": "stop"}
    assert body["usage"]["completion_tokens"] == at + 1


def test_end_of_text_stops_unless_ignored(server, text):
    at = text.index("e")
    assert TOKENIZER.encode("e").ids == [E_ID]
    for fields in ({"ignore_eos": False}, {"ignore_eos": None}):
        body = server.complete(max_tokens=120, **SEEDED, **fields)
        assert body["choices"][0]["text"] == text[:at] and body["choices"][0]["finish_reason"] == "stop"
        assert body["usage"]["completion_tokens"] == at + 1


def test_special_tokens(server):
    # The end-of-text token is in the text only when asked for.
    seeds = range(20)
    fields = dict(prompt="x", max_tokens=100, temperature=1.5)
    for seed in seeds:
        shown = server.complete(**fields, seed=seed, skip_special_tokens=False)["choices"][0]["text"]
        if "<|endoftext|>" in shown:
            hidden = server.complete(**fields, seed=seed)["choices"][0]["text"]
            assert hidden == shown.replace("<|endoftext|>", "")
            return
    pytest.fail(f"no end-of-text token in {len(seeds)} texts")


def test_many_at_once_are_each_what_they_are_alone(server):
    async def work():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:

            async def one(seed):
                answer = await client.completions.create(
                    model="dense",
                    prompt="x" * (1 + 11 * seed),
                    max_tokens=10,
                    seed=seed,
                    extra_body={"ignore_eos": True},
                )
                return answer.choices[0].text

            return await asyncio.gather(*(one(seed) for seed in range(24)))

    together = asyncio.run(work())
    alone = [
        server.complete(prompt="x" * (1 + 11 * s), max_tokens=10, seed=s)["choices"][0]["text"]
        for s in range(24)
    ]
    # A draw may fall within rounding of a boundary, once in thousands.
    assert sum(a != b for a, b in zip(together, alone, strict=True)) <= 1


def test_lowkey_block_and_headers(server, checkpoints):
    for name, d_k in (("dense", 32), ("reduced", 16)):
        response = server.http.post(
            "/v1/completions", json={"model": name, "prompt": "Hi", "max_tokens": 9, "ignore_eos": True}
        )
        lowkey = response.json()["lowkey"]
        assert set(lowkey) == {
            *("variant", "state_bytes", "recurrent_bytes", "conv_bytes", "kv_bytes", "state_dtype", "d_k"),
            *("queue_s", "ttft_s", "decode_s"),
            *("tokens_per_second", "cached_tokens", "finish_reason"),
        }
        assert (lowkey["variant"], lowkey["d_k"], lowkey["state_dtype"]) == (name, d_k, "float32")
        assert lowkey["cached_tokens"] == 0
        assert 0 <= lowkey["queue_s"] <= lowkey["ttft_s"]
        assert lowkey["tokens_per_second"] == pytest.approx(8 / lowkey["decode_s"])
        assert response.headers["x-lowkey-state-bytes"] == str(lowkey["state_bytes"])
        assert float(response.headers["x-lowkey-tokens-per-second"]) == pytest.approx(
            lowkey["tokens_per_second"], abs=1e-3
        )


def test_one_token_has_no_speed(server):
    response = server.http.post("/v1/completions", json={"model": "dense", "prompt": "Hi", "max_tokens": 1})
    assert response.json()["lowkey"]["tokens_per_second"] is None
    assert response.headers["x-lowkey-tokens-per-second"] == "null"


def test_the_whole_context_can_be_used(server):
    body = server.complete(prompt="a" * (CONTEXT - 2), max_tokens=2)
    assert body["usage"]["total_tokens"] == CONTEXT


@pytest.mark.parametrize("temperature", [0, 2])
def test_only_allowed_tokens_are_generated(server, temperature):
    allowed = TOKENIZER.encode("xyz").ids
    fields = {
        "max_tokens": 40,
        "temperature": temperature,
        "seed": 3,
        "logprobs": 0,
        "repetition_penalty": 1.5,
    }
    for more in ({}, {"n": 3}, {"logit_bias": {"5": 100}}, {"min_tokens": 40}):
        for choice in server.complete(**fields, **more, allowed_token_ids=[*allowed, 0])["choices"]:
            assert set(choice["text"]) <= set("xyz") and choice["finish_reason"] in ("stop", "length")
    one = server.complete(**fields, allowed_token_ids=[E_ID])["choices"][0]
    assert one["text"] == "e" * 40
    # They are the model's own, of whatever it would have said.
    assert max(one["logprobs"]["token_logprobs"]) < 0


def test_a_stop_text_is_kept_on_request(server, text):
    end = text[50:53]
    at = text.index(end) + len(end)
    fields = {**SEEDED, "max_tokens": 120, "stop": [end], "include_stop_str_in_output": True}
    assert server.complete(**fields)["choices"][0]["text"] == text[:at]
    chunks = [json.loads(event) for event in server.events(**fields)[:-1]]
    assert "".join(c["choices"][0]["text"] for c in chunks) == text[:at]


def test_a_truncated_prompt_is_the_end_of_it(server):
    ids = TOKENIZER.encode("a long beginning, and then: Hi").ids
    whole = server.complete(prompt=ids[-8:], max_tokens=20, temperature=0)
    cut = server.complete(prompt=ids, truncate_prompt_tokens=8, max_tokens=20, temperature=0)
    assert cut["choices"] == whole["choices"] and cut["usage"]["prompt_tokens"] == 8
    full = server.complete(prompt=[5] * CONTEXT, truncate_prompt_tokens=-1, max_tokens=7)
    assert full["usage"]["prompt_tokens"] == CONTEXT - 7
